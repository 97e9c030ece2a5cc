"""A machine may be lost at any instant: the run that is started again is the one never killed.

`launch/test.sh -m slow tests/test_sigkill.py -k 50 -s` kills fifty times, `-k 200` two hundred.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import train
from est_ds.checkpoints.index import read_index
from est_ds.checkpoints.reader import damage
from est_ds.checkpoints.store import BEST, LATEST, Store
from est_ds.run.metrics import FILE, read_metrics
from est_ds.verify_resume.compare import Bounds, compare_runs
from namespaces import kill_all

STEPS, ENDS, SAVED_EVERY, EVALUATED_EVERY = 60, (20, 40, 60), 4, 6
SETTINGS = [
    f"steps={STEPS}", "model.num_hidden_layers=4", "batch={global: 4, micro: 2}",
    "method={name: est, balance_groups: 2, phases: ["
    "{name: small, until: 20, layers: 0.5, heads: 0.5, columns: 0.5}, "
    "{name: narrow, until: 40, heads: 0.5, columns: 0.5}, {name: full, until: 60}]}",
    f"checkpoint={{every: {SAVED_EVERY}, keep_last: 2}}",
    f"evaluate={{every: {EVALUATED_EVERY}, sequences: 48}}",
]  # fmt: skip
# Runs take turns; both are of two processes and write checkpoints in the background.
LAYOUTS = {
    "data 2, ZeRO 1, fp32": ["parallel={pipe: 1, zero: 1, processes: 2}"],
    "pipe 2, ZeRO 1, bf16": ["parallel={pipe: 2, zero: 1, processes: 2}", "precision=bf16"],
}
KINDS = ("training", "saving", "evaluating", "phase boundary", "starting")
TIMES = (
    *("step_s", "step_cpu_s", "trained_s", "tokens_per_s"),
    *("pipe_imbalance", "pipe_waiting", "start"),
)


def command(run: Path, run_dir: Path, layout: str) -> list[str]:
    arguments = ["train", run, f"run_dir={run_dir}", *SETTINGS, *LAYOUTS[layout]]
    return [sys.executable, "-m", "est_ds.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def uninterrupted(synthetic_run, tmp_path_factory) -> Callable[[str], Path]:
    """The run directory of a layout's run that nobody kills; trained when first asked for."""
    folder, done = tmp_path_factory.mktemp("uninterrupted"), {}

    def uninterrupted(layout: str) -> Path:
        if layout not in done:
            run_dir = folder / str(len(done))
            to_the_end(synthetic_run, run_dir, layout)
            done[layout] = run_dir
        return done[layout]

    return uninterrupted


def to_the_end(run: Path, run_dir: Path, layout: str) -> None:
    ended = train(run, f"run_dir={run_dir}", *SETTINGS, *LAYOUTS[layout], processes=2)
    assert ended.returncode == 0, ended.stderr


class Seen:
    """What a run's files and output say, from outside."""

    def __init__(self, run_dir: Path, output: Path) -> None:
        self.run_dir, self.output = run_dir, output
        self.store = Store(run_dir / "checkpoints")

    @property
    def last_saved(self) -> int:
        return self.store.named(LATEST) or 0

    @property
    def logged(self) -> int:
        """Steps that stand in `metrics.jsonl`."""
        return len(read_metrics(self.run_dir)[0])

    @property
    def goes_on(self) -> bool:
        """Whether the last start got as far as a first step: the files are its own from there."""
        began = re.search(r"ing at step (\d+) of", self.output.read_text())
        return bool(began) and self.logged > int(began[1])

    def saving(self) -> list[int]:
        partial = self.store.folder.glob(".step_*.partial")
        return [int(folder.name[6:14]) for folder in partial]

    def evaluating(self) -> int | None:
        """The steps done, when they are logged and their evaluation is not."""
        steps, evaluations = read_metrics(self.run_dir)
        done = len(steps)
        due = done and (done % EVALUATED_EVERY == 0 or done == STEPS)
        missing = due and (not evaluations or evaluations[-1]["step"] < done - 1)
        return done if missing else None

    def doing(self) -> str:
        """What a killed start was at; several things at a time, as it saves aside."""
        if not self.goes_on:
            return "starting"
        found = ["saving"] * bool(self.saving()) + ["evaluating"] * bool(self.evaluating())
        if self.store.steps()[-1:] > [self.last_saved]:
            found.append("naming the latest")
        if any(end - 1 <= self.logged <= end + 1 for end in ENDS):
            found.append("phase boundary")
        return ", ".join(found) or "training"


def instants(kind: str, draw: random.Random, seen: Seen) -> Iterator[bool]:
    """Whether it is time to kill a run that starts now, each time it is asked."""
    saved, ahead = seen.last_saved, draw.randrange(8)
    config = seen.run_dir / "config.yaml"
    before = config.stat().st_mtime_ns if config.exists() else 0

    def reached() -> bool:
        if kind == "starting":  # half of them later, where it reads and writes the run's files
            return ahead < 4 or (config.exists() and config.stat().st_mtime_ns > before)
        if not seen.goes_on:
            return False
        if kind == "saving":
            return any(step > min(saved + ahead, STEPS - 1) for step in seen.saving())
        if kind == "evaluating":
            return (seen.evaluating() or 0) > min(saved + ahead, STEPS - 1)
        if kind == "phase boundary":
            return seen.logged >= min(end for end in ENDS if end >= saved) - 1
        return seen.logged > saved + ahead

    while not reached():
        yield False
    longest_s = {"saving": 0.04, "phase boundary": 0.3}.get(kind, 0.1)
    if kind == "starting":
        longest_s = 8.0 if ahead < 4 else 2.0
    delay_s, began = draw.uniform(0.0, longest_s), time.monotonic()
    while time.monotonic() - began < delay_s:
        yield False
    yield True


def live(arguments: list[str], seen: Seen, kind: str, draw: random.Random) -> float | None:
    """Starts the run once.

    Returns:
        Seconds until it was killed; None if it came to its end before.
    """
    began = time.monotonic()
    with seen.output.open("w") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        started = subprocess.Popen(arguments, **streams)
    for is_time in instants(kind, draw, seen):
        if started.poll() is not None:
            assert started.returncode == 0, seen.output.read_text()
            return None
        if is_time:
            break
        time.sleep(0.005)
    lived_s = time.monotonic() - began
    kill_all(started, seen.run_dir)
    return lived_s


def check_equal(run_dir: Path, expected: Path) -> None:
    """A finished run is the other one: every line but for times, every bit, and nothing else."""
    lines = [
        [json.loads(line) for line in (run / FILE).read_text().splitlines()]
        for run in (run_dir, expected)
    ]
    for entry in (entry for run in lines for entry in run):
        for name in TIMES:
            entry.pop(name, None)
    assert lines[0] == lines[1]
    assert [e["step"] for e in lines[0] if "loss" in e] == list(range(STEPS))
    found = compare_runs(expected, run_dir, Bounds())
    assert found.first is None and not found.largest, found
    stores = [Store(run / "checkpoints") for run in (run_dir, expected)]
    assert stores[0].steps() == stores[1].steps()
    for pointer in (LATEST, BEST):
        assert stores[0].named(pointer) == stores[1].named(pointer)
    for step in stores[0].steps():
        assert damage(stores[0].path(step)) is None
        ours, theirs = (read_index(store.path(step)) for store in stores)
        assert (ours.files, ours.eval_loss) == (theirs.files, theirs.eval_loss)
        for index in (ours, theirs):
            index.state.config.pop("run_dir")
        assert ours.state == theirs.state.model_copy(update={"trained_s": ours.state.trained_s})
    names = [
        {p.relative_to(run) for p in run.rglob("*") if "tensorboard" not in p.parts}
        for run in (run_dir, expected)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "kills", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (50, 200))]
)
def test_killed_run_is_the_one_never_killed(
    kills,
    synthetic_run,
    uninterrupted,
    tmp_path,
):
    draw = random.Random(kills)
    log = (tmp_path / "kills.txt").open("w", buffering=1)
    counts: Counter[tuple[str, str]] = Counter()
    lost_steps, finished = [], 0

    def note(text: str) -> None:
        print(text, file=log)
        print(text, flush=True)

    note(f"log: {log.name}")
    while counts.total() < kills:
        layout = list(LAYOUTS)[finished % len(LAYOUTS)]
        run_dir = tmp_path / f"run_{finished}"
        arguments = command(synthetic_run, run_dir, layout)
        seen = Seen(run_dir, tmp_path / f"run_{finished}.log")
        while (done := counts.total()) < kills:
            kind = KINDS[done % len(KINDS)]
            lived_s = live(arguments, seen, kind, draw)
            if lived_s is None:
                break
            hit = seen.doing()
            counts[kind, hit] += 1
            note(
                f"{done + 1:3}  {kind:14}  after {lived_s:4.1f} s: {hit:27}  step {seen.logged}, "
                f"checkpoint of {seen.last_saved}"
            )
            assert all(damage(seen.store.path(step)) is None for step in seen.store.steps())
            lost_steps.append(seen.logged - seen.last_saved)
            assert lost_steps[-1] <= 2 * SAVED_EVERY
        to_the_end(synthetic_run, run_dir, layout)
        check_equal(run_dir, uninterrupted(layout))
        finished += 1
        note(f"     run {finished} ({layout}) came to its end: every bit as uninterrupted")
    note(f"{kills} kills, {finished} runs finished, all equal; steps lost: up to {max(lost_steps)}")
    for (kind, hit), count in sorted(counts.items()):
        note(f"  wanted {kind}, hit {hit}: {count}")
