"""A tiny real corpus and run, and the real command line, for every test that trains."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from cases.tiny import TINY_RUN
from forks import fork, wait
from layouts import LAYOUTS, METHODS, Lazily, train_in, write_run
from workers import launched

ROOT = Path(__file__).resolve().parents[1]

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


def est_ds(*arguments: str, cwd: Path = ROOT, timeout: float = 300, **environment: str):
    """`est-ds ARGUMENTS` in a forked process; what it starts itself is started as ever."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return _forked(arguments, [environment], cwd, timeout)


def train(
    run: Path, *overrides: str, processes: int, first: Callable = int, **environment: str
) -> subprocess.CompletedProcess:
    """What `est-ds train RUN OVERRIDES` is on every rank, without the launcher that starts them.

    Args:
        first: is called in every rank before all else.

    Returns:
        What all ranks said, and the exit code of them all; 1 if they differ.
    """
    ranks = launched(processes, **environment)
    return _forked(("train", run, *overrides), list(ranks), first=first)


def _forked(
    arguments: tuple,
    environments: list[dict[str, str]],
    cwd: Path = ROOT,
    timeout: float = 300,
    first: Callable = int,
) -> subprocess.CompletedProcess:
    words = [str(a) for a in arguments]
    with TemporaryDirectory() as folder:
        out, err = streams = Path(folder, "out"), Path(folder, "err")
        codes = wait([fork(_main, (words, first), streams, cwd, e) for e in environments], timeout)
        code = codes[0] if len(set(codes)) == 1 else 1
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def _main(words: list[str], first: Callable) -> None:
    from est_ds.cli import main

    first()
    sys.argv = ["est-ds", *words]
    main(words)


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


@pytest.fixture(scope="session")
def synthetic_run(tmp_path_factory) -> Path:
    """A run file on synthetic tokens."""
    return write_run(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="session")
def in_layouts(synthetic_run, tmp_path_factory) -> dict[tuple[str, str, str], Path]:
    """Finished runs of a (layout, method, precision) with all their checkpoints; trained when first
    asked for."""
    folder = tmp_path_factory.mktemp("in_layouts")

    def trained(key: tuple[str, str, str]) -> Path:
        layout, method, precision = key
        overrides = [f"method={METHODS[method]}", f"precision={precision}"]
        [run] = train_in(folder, synthetic_run, [(layout, f"{method} {precision}", overrides)])
        return run

    return Lazily(trained)
