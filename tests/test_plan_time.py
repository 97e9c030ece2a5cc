"""`est-ds plan --gpu`: GPUs, hours and money."""

from __future__ import annotations

import argparse
import json

import pytest

from conftest import ROOT
from est_ds.config.run_file import load_run
from est_ds.cost.flops import StepSize
from est_ds.cost.gpus import GPUS, gpu_of
from est_ds.cost.peaks import PEAKS
from est_ds.cost.time import Job, step_seconds
from est_ds.design import make_outline
from est_ds.errors import UserError
from est_ds.report.asked import Asked


def test_every_gpu_with_a_peak_rate_can_be_planned_for():
    assert {gpu.device for gpu in GPUS.values()} == set(PEAKS)
    for gpu in GPUS.values():
        assert gpu.peak_flops("bf16") == 1e12 * PEAKS[gpu.device].bf16
        # The network is no faster than the links of a node, and they are slower than the memory.
        assert gpu.network_bytes_s <= gpu.link_bytes_s < gpu.memory_bytes_s
        assert 16 * 2**30 < gpu.memory_bytes < 192 * 2**30


def test_an_unknown_gpu_is_named_with_its_neighbour():
    with pytest.raises(UserError, match=r"--gpu=h100 is not known; did you mean 'h100-\w+'\? "):
        gpu_of("h100")


def options(**given) -> Asked:
    names = ("gpu", "count", "processes")
    return Asked.of(argparse.Namespace(**{name: given.get(name) for name in names}))


def test_count_is_the_number_of_processes():
    assert options(gpu="h100-80g", count=8).processes == 8
    with pytest.raises(UserError, match="--count=8 has no effect without --gpu"):
        options(count=8)
    with pytest.raises(UserError, match="--count=8 and --processes=4 differ"):
        options(gpu="h100-80g", count=8, processes=4)


def job(gpu: str, run: str, *overrides: str) -> Job:
    outline = make_outline(load_run(ROOT / "configs" / "run" / run, list(overrides)))
    size = StepSize(**outline.flops_size(outline.config.batch.micro))
    parts = outline.config, outline.method, outline.facts.pieces, outline.cuts, size
    return Job(gpu_of(gpu), *parts)


HALVES = (
    "method={name: est, phases: [{until: 0.3, layers: 0.5, heads: 0.5, columns: 0.5}, "
    "{until: 0.6, heads: 0.5, columns: 0.5}, {until: 1.0}]}"
)
ONE_GPU = (HALVES, "precision=bf16", "parallel={pipe: 1, zero: 1, processes: 1}")
# tests/benchmarks/README.md: tokens/s on one H200 of phases with half of the layers, heads and
# columns, with half of the heads and columns, and of the full model.
MEASURED = {
    "est_tinyllama.yaml": {
        True: (16_384, (121_658, 84_806, 60_881)),
        False: (16_384, (95_712, 61_485, 46_047)),
    },
    "est_gpt2.yaml": {True: (32_768, (254_936, 242_796, 219_012))},
}
CASES = [(run, compiled) for run, rows in MEASURED.items() for compiled in rows]


@pytest.mark.parametrize("run, compiled", CASES)
def test_steps_take_the_time_that_they_took_on_an_h200(run, compiled):
    tokens, speeds = MEASURED[run][compiled]
    flags = f"compile={json.dumps(compiled)}"
    measured = job("h200", run, *ONE_GPU, flags)
    sequences = tokens // measured.size.sequence
    measured = job(
        "h200", run, *ONE_GPU, flags, f"batch={{global: {sequences}, micro: {sequences}}}"
    )
    for phase, speed in enumerate(speeds):
        assert step_seconds(measured, phase).total_s == pytest.approx(tokens / speed, rel=0.04)
