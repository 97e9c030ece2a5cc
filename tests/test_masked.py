"""`method.compute: masked` trains what slicing trains, computes everything, and says so.

Prints how far its losses are from those of slicing:
`launch/test.sh tests/test_masked.py -m slow -s`.
"""

from __future__ import annotations

import json

import pytest
import yaml

from cases.families import CASES, shape_of, training_of
from cases.methods import SECTIONS, fitting, taken
from cases.tiny import TINY_MODEL
from conftest import refused
from est_ds.config.run_file import load_run
from est_ds.cost.flops import dense_flops
from est_ds.cost.pipe_cuts import pipe_stage_costs
from est_ds.plans.methods import build_method
from est_ds.report.plan_text import plan_report
from est_ds.run.metrics import read_metrics
from est_ds.slicing.families import family_of, hf_config
from layouts import LAYOUTS, METHODS, MORE_LAYOUTS, name_of, train_in
from reference import assert_close, largest_difference

STEPS = 6
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "t5", "mamba", "mamba2")
FAST = [("llama", "est_sublayer"), ("bert", "layer_drop_balanced")]
SLICED_AND_MASKED = ("sliced", "masked")


def section_of(family: str, name: str) -> dict:
    """Of the table, for few layers and steps."""
    section = fitting(taken(SECTIONS[name], family), shape_of(CASES[family]).num_layers)
    return section | {"until": 0.5} if name == "static_sublayer" else section


def overrides_of(family: str, name: str, compute: str) -> list[str]:
    model = {**CASES[family].section, "vocab_size": 96}
    method = yaml.safe_dump(
        section_of(family, name) | {"compute": compute}, default_flow_style=True
    )
    return [
        f"steps={STEPS}",
        *training_of(model),
        "optimizer.eps=1.0e-6",  # with 1e-8 rounding alone decides where some elements of T5 go
        f"method={' '.join(method.split())}",
        "checkpoint={every: 100}",
        "evaluate={every: 6, sequences: 4}",
    ]


def losses_of(run_dir) -> list[float]:
    steps, evaluations = read_metrics(run_dir)
    return [e["loss"] for e in steps] + [e["eval_loss"] for e in evaluations]


def check_equal(run, folder, pairs, layout="1 process") -> None:
    """Trains every (family, method) sliced, in one process, and masked; compares the losses."""
    cases = [
        (on, name_of(*pair, compute), overrides_of(*pair, compute))
        for pair in pairs
        for compute, on in zip(SLICED_AND_MASKED, ("1 process", layout))
    ]
    directories, saves = train_in(folder, run, cases, timeout_s=3600), 0
    for (family, name), sliced, masked in zip(pairs, directories[::2], directories[1::2]):
        apart = largest_difference(losses_of(masked), losses_of(sliced))
        print(f"{family} | {name} | {layout} | {apart:.1e}")
        assert_close(losses_of(masked), losses_of(sliced))
        ones, others = (read_metrics(directory)[0] for directory in (sliced, masked))
        assert [e["plan_digest"] for e in others] == [e["plan_digest"] for e in ones]
        saves += any(e["flops_active"] < e["flops_dense"] for e in ones)
        for one, other in zip(ones, others):
            assert other["flops_active"] == other["flops_dense"] == one["flops_dense"]
            assert other["blocks_active"] == other["blocks_dense"]
            assert other["kept_layers"] == one["kept_layers"]
    assert saves > 0.8 * len(pairs)  # decay_drop may keep everything for six steps


def test_masked_training_equals_sliced_training(synthetic_run, tmp_path):
    check_equal(synthetic_run, tmp_path, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_training_equals_sliced_training_with_every_method(family, synthetic_run, tmp_path):
    able = [n for n, s in SECTIONS.items() if s["name"] not in ("full", "token_drop")]
    names = [n for n in able if taken(SECTIONS[n], family)]
    check_equal(synthetic_run, tmp_path, [(family, name) for name in names])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [n for n in {**LAYOUTS, **MORE_LAYOUTS} if n != "1 process"])
def test_masked_training_in_every_layout_equals_sliced_training(layout, synthetic_run, tmp_path):
    pairs = [("llama", "est"), ("llama", "layer_drop_sublayer"), ("bert", "est_bernoulli")]
    pairs += [("t5", "layer_drop"), ("mamba", "est"), ("mamba2", "est")]
    check_equal(synthetic_run, tmp_path, pairs, layout)


@pytest.mark.slow
def test_elements_left_out_rest_under_freeze_as_with_slicing(synthetic_run, tmp_path):
    cases = [
        (
            "1 process",
            compute,
            [*overrides_of("llama", "est_layers", compute), "optimizer.inactive=freeze"],
        )
        for compute in SLICED_AND_MASKED
    ]
    sliced, masked = train_in(tmp_path, synthetic_run, cases)
    assert_close(losses_of(masked), losses_of(sliced))


def test_a_plan_of_masked_compute_says_that_it_saves_nothing(synthetic_run):
    overrides = [f"method={METHODS['est']}", "method.compute=masked"]
    config = load_run(synthetic_run, overrides)
    document = json.loads(plan_report(config, as_json=True))
    assert document["saved"] == {"blocks": 0.0, "model": 0.0}
    assert [phase["kept_layers"] for phase in document["phases"]] == [4, 8, 8]
    assert {phase[k] for phase in document["phases"] for k in ("blocks_ratio", "model_ratio")} == {
        1
    }
    text = " ".join(plan_report(config, as_json=False).split())
    assert "0.00% blocks (1.000x)" in text and "it saves nothing" in text


def test_stages_of_masked_compute_cost_what_dense_ones_cost():
    """A pipeline is cut by what is computed."""
    shape = family_of("llama").shape(hf_config(TINY_MODEL))
    section = {"name": "raptr", "phases": [{"until": 0.5, "layers": 2}, {"until": 1.0}]}
    method = build_method(section | {"compute": "masked"}, seed=0, steps=10, shape=shape)
    size = {"tokens": 64, "sequence": 64}
    assert sum(pipe_stage_costs(method, 0, [2, 4], **size)) == dense_flops(shape, **size).model


@pytest.mark.parametrize(
    "method", ["{name: full}", "{name: est, phases: [{until: 1.0}]}"], ids=["full", "est"]
)
def test_masked_compute_that_masks_nothing_is_refused(method, synthetic_run, capsys):
    arguments = ("plan", synthetic_run, f"method={method}", "method.compute=masked")
    assert "method.compute=masked cannot take effect" in refused(capsys, *arguments)
