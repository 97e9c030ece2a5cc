"""A tiny real corpus and run, and the real command line, for every test that trains."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]

TINY_MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}

TINY_RUN = {
    "seed": 3,
    "steps": 20,
    "model": TINY_MODEL,
    "method": {
        "name": "est",
        "balance_groups": 2,
        "phases": [
            {"name": "small", "until": 8, "layers": 0.5, "heads": 0.5, "columns": 0.5},
            {"name": "narrow", "until": 14, "heads": 0.5, "columns": 0.5},
            {"name": "full", "until": 20},
        ],
    },
    "batch": {"global": 8, "micro": 2},
    "parallel": {"pipe": 2, "zero": 1, "processes": 4},
    "optimizer": {"lr": 3e-3},
    "schedule": {"name": "cosine", "warmup": 2},
    "checkpoint": {"every": 5, "keep_last": 0},
    "evaluate": {"every": 10, "sequences": 10},
}


def run_command(*arguments: str, cwd: Path = ROOT, timeout: float = 300, **environment: str):
    """Runs a command to its end; standard output and error as text."""
    return subprocess.run(
        [str(a) for a in arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def est_ds(*arguments: str, **kwargs):
    """`est-ds ARGUMENTS` as a user starts it."""
    return run_command(sys.executable, "-m", "est_ds.cli", *arguments, **kwargs)


def tensorboard_points(run_dir: Path) -> dict[str, list[int]]:
    """Of every figure the steps at which TensorBoard shows a point."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [e.step for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A packed corpus of a few standard-library files: train, valid, tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    names = ("argparse", "ast", "calendar", "csv", "difflib", "heapq", "inspect", "json/decoder")
    library = Path(sysconfig.get_path("stdlib"))
    prep = (sys.executable, "-m", "data_prep")
    inputs = [library / f"{name}.py" for name in names]
    for arguments in (
        ("corpus", "--input", *inputs, "--out", folder / "text", "--held-out", "0.3"),
        ("tokenizer", "--input", folder / "text.train.jsonl", "--out", folder / "tokenizer",
         "--vocab", "512"),
        ("pack", "--input", folder / "text.train.jsonl", "--tokenizer", folder / "tokenizer",
         "--out", folder / "train"),
        ("pack", "--input", folder / "text.valid.jsonl", "--tokenizer", folder / "tokenizer",
         "--out", folder / "valid"),
    ):  # fmt: skip
        done = run_command(*prep, *arguments)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tiny_run(corpus, tmp_path_factory) -> Path:
    """A run file of a tiny Llama on the tiny corpus; every test gives its own run_dir."""
    file = tmp_path_factory.mktemp("run") / "tiny.yaml"
    data = {name: str(corpus / name) for name in ("train", "valid", "tokenizer")}
    tree = {"run_dir": "unset", **TINY_RUN, "data": {**data, "sequence": 64}}
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture(scope="session")
def tokenizer(corpus) -> Path:
    """Folder of a small sentencepiece tokenizer."""
    return corpus / "tokenizer"


@pytest.fixture(scope="session")
def trained(tiny_run, tmp_path_factory) -> Path:
    """A finished run in the default layout."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    done = est_ds("train", tiny_run, f"run_dir={run_dir}", "--processes", "4")
    assert done.returncode == 0, done.stderr
    (run_dir / "stdout.txt").write_text(done.stdout)
    (run_dir / "stderr.txt").write_text(done.stderr)
    return run_dir
