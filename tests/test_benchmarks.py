"""Every benchmark runs, at sizes at which its figures mean nothing.

Those that need no processes of their own run one after the other in one; `-m slow` has the rest,
and more of their settings.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from conftest import run_command

FOLDER = Path(__file__).parent / "benchmarks"
SMALL = ("--hidden", "128", "--layers", "2", "--batch", "1", "--sequence", "32", "--rounds", "1")

TINY = {
    "blocks.py": SMALL,
    "overhead.py": (*SMALL, "--draws", "2"),
    "step.py": (*SMALL, "--vocabulary", "128"),
    "head.py": ("--tokens", "64", "--vocabulary", "128", "--hidden", "16", "--rounds", "1"),
    "documents.py": ("--hidden", "128", "--layers", "1", "--sequence", "512", "--rounds", "1"),
    "gpu.py": ("--tiny", "--backend", "none", "--warmup", "0", "--steps", "1"),
    "memory.py": (
        "--gpu",
        str(FOLDER.parents[1] / "configs/run/quickstart.yaml"),
        "model.num_hidden_layers=4",
        "model.vocab_size=64",
        "data.sequence=16",
        "batch.micro=1",
    ),
    "naive.py": ("--steps", "12"),
    "loader.py": ("--tokens", "200000", "--batch", "64", "--sequence", "64", "--steps", "1"),
    "packing.py": ("--rounds", "1"),
    "products.py": ("--hidden", "64", "--layers", "1", "--tokens", "32", "--rounds", "1"),
    "estimates.py": (),
    "ranks.py": ("--ranks", "8", "24", "--steps", "1"),
}
STARTING_PROCESSES = {"dense.py", "moved.py", "steady.py"}
PARTS = {"common.py", "contenders.py", "gate.py"}
IN_TURN = """
import json, runpy, sys
folder, scripts = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, folder)
if __name__ == "__main__":
    for script, arguments in scripts.items():
        sys.argv = [script, *arguments]
        runpy.run_path(f"{folder}/{script}", run_name="__main__")
"""


def run(script: str, *arguments: str) -> str:
    done = run_command(sys.executable, FOLDER / script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_script_runs(corpus):
    assert {f.name for f in FOLDER.glob("*.py")} == {*TINY, *STARTING_PROCESSES, *PARTS}
    texts = ("--input", f"{corpus}/text.train.jsonl", "--tokenizer", f"{corpus}/tokenizer")
    scripts = TINY | {"packing.py": (*TINY["packing.py"], *texts)}
    done = run_command(sys.executable, "-c", IN_TURN, FOLDER, json.dumps(scripts))
    assert done.returncode == 0, done.stderr
    for row in (
        "columns .5",
        "phase narrow",
        "GFLOP/s",
        "dense step",
        "late: of these",
        "without, 0.2",
        "x the need of 8",
        "| narrow |",
        "24 ranks resume",
        "  512 pipe 2, ZeRO 1",
    ):
        assert row in done.stdout, done.stdout
    assert len(re.findall(r"bytes a rank, 24 over 8: \S+  ok", done.stdout)) == 3, done.stdout
    [difference] = re.findall(r"8 documents in each; losses differ by (\S+)", done.stdout)
    assert float(difference) < 1e-6
    apart = re.findall(r"(by hand|est_ds): at most (\S+) from plain torch", done.stdout)
    apart = {name: float(figure) for name, figure in apart}
    assert apart["est_ds"] < 1e-5 < 1e-3 < apart["by hand"], done.stdout


def test_a_case_that_there_is_not_is_one_line():
    done = run_command(sys.executable, FOLDER / "memory.py", "nonsense")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no case is called 'nonsense'; known are llama, est, fp32, ZeRO 0; " in done.stderr


BAD = {
    "blocks.py --hidden 30": "blocks.py: error: --hidden=30: use a multiple of 4",
    "blocks.py --layers 1": "keeps all 1 of 1 layers (counts are rounded); use 1.0.",
    "step.py --zero 4": "argument --zero: invalid choice: 4",
    "step.py --micro 3": "--micro 3 does not divide --batch 4",
    "documents.py --documents 5000": "--documents 5000 is more than --sequence 2048",
    "overhead.py --run nowhere.yaml": "does not exist; check the path",
    "dense.py --hidden 30": "dense.py: error: --hidden=30: use a multiple of 4",
    "dense.py --deepspeed 7": "argument --deepspeed: invalid json_section value: '7'",
    "loader.py --tokens 10": "--tokens: two corpora, the second of half of them",
    "packing.py --input nowhere --tokenizer nowhere": "No such file or directory: 'nowhere'",
    "packing.py --input README.md --tokenizer nowhere": "every line must be JSON with a `text`",
    "moved.py --steps 1": "--steps 1: use at least --kills + 2",
    "gpu.py --tiny --backend none_such": "--backend none_such: use none, ",
    "gpu.py --tiny --peak -1": "argument --peak: '-1' is not a number above 0",
    "memory.py --gpu nowhere.yaml": "does not exist; check the path",
    "steady.py --steps 1": "--steps 1: a stretch has at least 2 of them",
    "estimates.py --gpu": "unrecognized arguments: --gpu",
    "ranks.py --ranks 1000000000": "--ranks 1000000000: rank 0 on ",
}


@pytest.mark.parametrize(
    "command",
    [c if c.startswith("loader") else pytest.param(c, marks=pytest.mark.slow) for c in BAD],
)
def test_what_a_script_cannot_do_is_one_line(command):
    script, *arguments = command.split()
    done = run_command(sys.executable, FOLDER / script, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert BAD[command] in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script, option", [("head.py", "--rounds"), ("ranks.py", "--ranks")])
def test_counts_of_nothing_are_refused(script, option):
    done = run_command(sys.executable, FOLDER / script, option, "0")
    assert done.returncode == 2 and "'0' is not a whole number of at least 1" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_runs(family):
    lines = run("blocks.py", *SMALL, "--family", family).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]][:2] == [
        "layers, heads, columns .5",
        "heads, columns .5",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["0", "1"])
def test_step_runs(zero):
    assert "layers .5" in run("step.py", *SMALL, "--vocabulary", "128", "--zero", zero)


@pytest.mark.slow
def test_overhead_runs():
    out = run("overhead.py", *SMALL, "--draws", "2")
    assert "phase narrow" in out and "dense step" in out


@pytest.mark.slow
def test_dense_runs_every_loop_that_needs_no_other_package():
    rows = run("dense.py", *SMALL, "--vocabulary", "128").splitlines()[2:]
    loops = ["bare", "est_ds_zero0", "est_ds_zero1", "trainer", "trainer_zero1"]
    assert [row.split()[0] for row in rows] == loops


@pytest.mark.slow
def test_gpu_compiles_few_graphs_for_all_layers_counts_and_scales():
    """Sliced layers (the first is traced again), whole ones, and these with a scale."""
    rows = run("gpu.py", "--tiny", "--backend", "aot_eager", "--warmup", "5", "--steps", "2")
    compiled, late = zip(*(map(int, row.split()[-2:]) for row in rows.splitlines()[2:9]))
    assert sum(compiled) <= 4 and compiled[2] == 1 and set(late) == {0}


@pytest.mark.slow
def test_steady_runs():
    rows = run("steady.py", "--steps", "8", "--stretches", "2").splitlines()[1:]
    assert [row[:16].strip() for row in rows] == [f"data 2, ZeRO {zero}" for zero in range(4)]


@pytest.mark.slow
def test_loader_runs():
    rows = run("loader.py", "--tokens", "2000000", "--batch", "64", "--steps", "1").splitlines()
    assert len(rows) == 6 and all("x the need of 8 GPUs" in row for row in rows)


@pytest.mark.slow
def test_packing_runs(corpus):
    arguments = ("--input", corpus / "text.train.jsonl", "--tokenizer", corpus / "tokenizer")
    rows = run("packing.py", *arguments, "--rounds", "1").splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["1", "2"]
