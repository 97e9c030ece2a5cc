"""Every benchmark runs, at sizes at which its figures mean nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import run_command

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "benchmarks"
SMALL = ("--hidden", "128", "--layers", "2", "--batch", "1", "--sequence", "32", "--rounds", "1")


def run(script: str, *arguments: str) -> str:
    done = run_command(sys.executable, FOLDER / script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_runs(family):
    lines = run("blocks.py", *SMALL, "--family", family).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]][:2] == [
        "layers, heads, columns .5", "heads, columns .5"
    ]  # fmt: skip


@pytest.mark.parametrize("zero", ["0", "1"])
def test_step_runs(zero):
    assert "layers .5" in run("step.py", *SMALL, "--vocabulary", "128", "--zero", zero)


def test_overhead_runs():
    out = run("overhead.py", *SMALL, "--draws", "2")
    assert "phase narrow" in out and "dense step" in out


def test_dense_runs_every_loop_that_needs_no_other_package():
    rows = run("dense.py", *SMALL, "--vocabulary", "128").splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["bare", "est_ds_zero0", "est_ds_zero1", "trainer"]


def test_gpu_compiles_one_graph_for_sliced_layers_and_one_for_whole_ones():
    rows = run("gpu.py", "--tiny", "--backend", "aot_eager", "--warmup", "1", "--steps", "3")
    compiled = [row.split()[-2:] for row in rows.splitlines()[2:5]]
    assert compiled == [["1", "0"], ["0", "0"], ["1", "0"]]


def test_steady_runs():
    rows = run("steady.py", "--steps", "8", "--stretches", "2").splitlines()[1:]
    assert [row[:16].strip() for row in rows] == [f"data 2, ZeRO {zero}" for zero in range(4)]


def test_loader_runs():
    rows = run("loader.py", "--tokens", "2000000", "--batch", "64", "--steps", "1").splitlines()
    assert len(rows) == 6 and all("x the need of 8 GPUs" in row for row in rows)


def test_packing_runs(corpus):
    arguments = ("--input", corpus / "text.train.jsonl", "--tokenizer", corpus / "tokenizer")
    rows = run("packing.py", *arguments, "--rounds", "1").splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["1", "2"]
