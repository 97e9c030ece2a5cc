"""A tiny real corpus and run, and the real command line, for every test that trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

import slices
from cases.tiny import TINY_RUN
from forks import fork, wait
from layouts import METHODS, Lazily, train_in, write_run
from namespaces import Job, signal_all
from workers import launched

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    help = "only the slice of the selected tests that the hash of a commit chooses, shuffled"
    parser.addoption("--slice", metavar="COMMIT", help=help)


# The files that take longest come first, so that at the end no process waits for another.
LONGEST = (
    *("nodes", "restarting", "checkpoints", "readme", "compare", "verify_resume", "divergence"),
    *("file_faults", "turns", "preempt", "training", "sigkill", "restart_nodes", "held_out"),
    *("new_method", "layouts", "micro_batches", "traffic", "schedule", "options", "slicing"),
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if commit := config.getoption("slice"):
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name.pop(name) for name in slices.chosen(list(by_name), commit)]
        config.hook.pytest_deselected(items=list(by_name.values()))
        print(f"slice {slices.slice_of(commit)} of {slices.SLICES}: {len(items)} tests")


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
    return _forked(_main, arguments, cwd, timeout, environment)


def _forked(verb: Callable, arguments, cwd: Path, timeout: float, environment: dict[str, str]):
    with TemporaryDirectory() as folder:
        streams = Path(folder, "out"), Path(folder, "err")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        process = fork(verb, ([str(a) for a in arguments],), streams, cwd, environment)
        [code] = wait([process], timeout)
        return subprocess.CompletedProcess(arguments, code, *(s.read_text() for s in streams))


def train(
    run: Path, *overrides: str, processes: int, first: Callable = int, timeout: float = 300
) -> subprocess.CompletedProcess:
    """What `est-ds train RUN OVERRIDES` is on every rank, without the launcher that starts them.

    Args:
        first: is called in every rank before all else.

    Returns:
        What all ranks said, and the exit code of them all; 1 if they differ.
    """
    with TemporaryDirectory() as folder:
        streams = Path(folder, "out"), Path(folder, "err")
        codes = wait(fork_ranks((run, *overrides), processes, streams, first), timeout)
        code = codes[0] if len(set(codes)) == 1 else 1
        return subprocess.CompletedProcess(
            ("train", run, *overrides), code, *(s.read_text() for s in streams)
        )


def fork_ranks(
    arguments: tuple, processes: int, streams: tuple[Path, Path], first: Callable = int
) -> list[ForkServerProcess]:
    """Starts the ranks of `est-ds train ARGUMENTS`; see `train`."""
    words = ["train", *map(str, arguments)]
    return [fork(_main, (words, first), streams, ROOT, e) for e in launched(processes)]


def _prepare(words: list[str]) -> None:
    from data_prep.__main__ import main

    sys.exit(main(words))


def _main(words: list[str], first: Callable = int) -> None:
    from est_ds.cli import main

    first()
    sys.argv = ["est-ds", *words]
    main(words)


def refused(capsys, *arguments) -> str:
    """The one line with which `est-ds ARGUMENTS`, called in this process, refuses its input."""
    from est_ds.cli import main

    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    output = capsys.readouterr()
    assert exit.value.code == 2, output
    assert "Traceback" not in output.err and output.out == ""
    assert output.err.startswith("est-ds: error: ") and output.err.count("\n") == 1
    return output.err


def begun_run(run, run_dir: Path, overrides) -> tuple[str, ...]:
    """Makes the directory of a run that has begun, without training; returns how to resume it."""
    from est_ds.config.run_file import load_run

    (run_dir / "checkpoints").mkdir(parents=True)
    config = load_run(run, [f"run_dir={run_dir}", *overrides])
    (run_dir / "config.yaml").write_text(config.to_yaml())
    (run_dir / "checkpoints" / "latest").write_text("")
    return (f"run_dir={run_dir}", *overrides, "parallel.processes=2")


def train_command(run, run_dir: Path, *more: str) -> list[str]:
    """The command line of `est-ds train`, for a process of its own."""
    command = [sys.executable, "-m", "est_ds.cli", "train", str(run), f"run_dir={run_dir}"]
    return [*command, *more]


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
    inputs = [library / f"{name}.py" for name in names]
    gather = ("corpus", "--input", *inputs, "--out", folder / "text", "--held-out", "0.3")
    train = f"tokenizer --input {folder}/text.train.jsonl --out {folder}/tokenizer --vocab 512"
    pack = f"pack --tokenizer {folder}/tokenizer"
    packs = [
        f"{pack} --input {folder}/text.{name}.jsonl --out {folder}/{name}"
        for name in ("train", "valid")
    ]
    for arguments in (gather, *(line.split() for line in (train, *packs))):
        done = _forked(_prepare, arguments, ROOT, 300, {})
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


@pytest.fixture
def write_study(tiny_run, tmp_path):
    """Writes a study of the tiny run; what is given replaces or (None) removes a field."""

    from made_studies import DENSE, LAYERS  # here: forked processes load this file

    def write(**changes) -> Path:
        tree = {
            "study_dir": str(tmp_path / "study"),
            "base": str(tiny_run),
            "set": {"steps": 8, "parallel": {"pipe": 1, "processes": 1}, "checkpoint.every": 4},
            "baseline": "dense",
            "arms": {"dense": DENSE, "layers": {"method": LAYERS}},
            "seeds": [0, 1, 2],
            "budgets": ["tokens", "flops"],
        }
        tree = {k: v for k, v in {**tree, **changes}.items() if v is not None}
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    return write


@pytest.fixture(scope="session")
def tokenizer(corpus) -> Path:
    """Folder of a small sentencepiece tokenizer."""
    return corpus / "tokenizer"


@pytest.fixture(scope="session")
def trained(tiny_run, tmp_path_factory) -> Path:
    """A finished run in the default layout."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    done = train(tiny_run, f"run_dir={run_dir}", processes=4)
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


@pytest.fixture
def job(cluster, tiny_run, tmp_path):
    """A run on the hosts of the test file's `cluster`; nothing of it is left at the end."""
    job = Job(cluster, tiny_run, tmp_path / "run")
    yield job
    signal_all(job.left(), signal.SIGKILL)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where corpora of buckets are staged; nothing is there yet."""
    from est_ds.data.manifest import _remote_manifest
    from est_ds.data.staging import CACHE, _staged_corpus, _staged_folder

    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    for known in (_remote_manifest, _staged_corpus, _staged_folder):
        known.cache_clear()
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def fast_exports(corpus, tmp_path_factory) -> dict[tuple, Path]:
    """Finished runs to export, by (model, objective, precision)."""
    from exports import FAST, train_cells

    return train_cells(tmp_path_factory.mktemp("exports"), corpus, FAST)
