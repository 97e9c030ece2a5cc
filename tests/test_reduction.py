"""Gradients of ZeRO 1 and 2 between backward and AdamW: the digits are DeepSpeed's."""

from __future__ import annotations

import json

import pytest
import torch

from cases.tiny import make_config
from est_ds.config.deepspeed_keys import reduces_flat, steps_in_place
from est_ds.engine.reduction import sum_of_squares
from layouts import LAYOUTS, METHODS
from workers import train_all

SHOWN = ("loss", "grad_norm", "plan_digest")
KEYS = {
    "ours": "",
    "in buckets": "{reduce_bucket_size: 20000}",
    "DeepSpeed's": "{reduce_scatter: true}",
}


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        ("bf16", "data 2, ZeRO 1"),
        pytest.param("fp32", "data 2, ZeRO 1", marks=pytest.mark.slow),
        pytest.param("fp32", "pipe 2 x data 2, ZeRO 1", marks=pytest.mark.slow),
    ],
)
def test_losses_and_norms_have_the_digits_of_deepspeeds_own_way(
    precision, layout, synthetic_run, tmp_path
):
    processes, arguments = LAYOUTS[layout]
    common = [*arguments, f"method={METHODS['est']}", f"precision={precision}", "log.every=1"]
    jobs = []
    for name, keys in KEYS.items():
        own = [f"deepspeed.zero_optimization={keys}"] if keys else []
        overrides = [f"run_dir={tmp_path / name}", *common, *own]
        jobs.append({"run": synthetic_run, "overrides": overrides})
    train_all(tmp_path / "logs", processes, jobs)
    ours, in_buckets, theirs = (shown(tmp_path / name) for name in KEYS)
    assert len(ours) == 20 and ours == in_buckets == theirs


def shown(run) -> list[tuple]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [tuple(line[key] for key in SHOWN) for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("zero", "offload", "keys", "flat", "in_place"),
    [
        (0, False, {}, False, False),
        (1, False, {}, True, True),
        (1, False, {"zero_optimization": {"reduce_bucket_size": 8}}, True, True),
        (1, False, {"zero_optimization": {"contiguous_gradients": True}}, False, True),
        (1, False, {"prescale_gradients": True}, False, True),
        (2, False, {}, False, True),
        (2, True, {}, False, False),
        (3, False, {}, False, False),
    ],
)
def test_a_run_file_that_asks_for_deepspeeds_way_gets_it(zero, offload, keys, flat, in_place):
    config = make_config(parallel={"zero": zero, "offload": offload}, deepspeed=keys)
    assert (reduces_flat(config), steps_in_place(config)) == (flat, in_place)
    half = make_config(
        parallel={"zero": zero or 1, "offload": offload}, deepspeed=keys, precision="bf16"
    )
    assert not steps_in_place(half)


def test_squares_of_many_elements_are_summed_as_in_float64():
    torch.manual_seed(0)
    large = torch.randn(1 << 24) + 1.0
    exact = float(large.double() @ large.double())
    found = sum_of_squares([large, torch.ones(3)], large.device)
    assert float(found) == pytest.approx(exact + 3, rel=3e-8)


def test_squares_tell_what_is_not_finite():
    for odd in (float("inf"), float("nan")):
        for at in (0, 299):
            gradient = torch.ones(300)
            gradient[at] = odd
            assert not sum_of_squares([gradient], gradient.device).isfinite()
