"""What a study has still to train, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from est_ds.report.text import seconds
from est_ds.studies.measure import try_steps
from est_ds.studies.queue import Places
from est_ds.studies.results import Results
from est_ds.studies.runs import Runs, StudyRun
from est_ds.training.record import device_name

START_S = 20.0  # of a run: the launcher, the imports, the last evaluation
# Of a study of fewer FLOPs the starts take the time, on any machine.
TINY_FLOPS, S_PER_FLOP = 1e12, 1e-10


@dataclass(frozen=True)
class Todo:
    """The runs that are left.

    Attributes:
        study: its folder.
        done: runs of the study that are done.
        runs: those to train. Of an arm whose grid is not finished those of its first values.
        places: runs beside each other.
        wall_s: seconds that they take; None where that is not known.
        disk_bytes: of checkpoints while they train.
    """

    study: str
    done: int
    runs: tuple[StudyRun, ...]
    places: int
    wall_s: float | None
    disk_bytes: float

    @property
    def flops(self) -> float:
        return sum(run.flops.model for run in self.runs)

    @property
    def arms(self) -> dict[str, list[int]]:
        """Steps of the runs of every arm."""
        arms: dict[str, list[int]] = {}
        for run in self.runs:
            arms.setdefault(run.arm, []).append(run.steps)
        return arms


def make_todo(
    runs: Runs, todo: Iterable[StudyRun], results: Results, places: Places, done: int
) -> Todo:
    """Adds up what runs cost: by the runs that are done, by the step times measured, or, where
    there are neither, by a few steps of the baseline on this machine.

    Args:
        todo: the runs that are to be trained.
        done: how many are done.
    """
    todo, beside = tuple(todo), len(places.environments)
    needed_s = expected_s(todo, results)
    if needed_s is None:
        is_tiny = sum(run.flops.model for run in todo) <= TINY_FLOPS
        per_flop = S_PER_FLOP if is_tiny else try_steps(runs, places.processes)
        needed_s = expected_s(todo, results, per_flop)
    wall_s = None if needed_s is None else needed_s / beside
    return Todo(str(runs.file.folder), done, todo, beside, wall_s, _disk_bytes(runs, todo, beside))


def todo_text(todo: Todo) -> str:
    """What is to be trained, in words."""
    lines = [f"{todo.study}: {todo.done + len(todo.runs)} runs, {todo.done} of them done"]
    for arm, steps in todo.arms.items():
        shown = ", ".join(f"{n:,}" for n in sorted(set(steps)))
        lines.append(f"  {arm}: {len(steps)} runs to train, of {shown} steps")
    if todo.wall_s is None:
        time = "hours not known before the corpora are there, or a run is done"
    else:
        beside = f", {todo.places} runs beside each other" if todo.places > 1 else ""
        time = f"about {seconds(todo.wall_s)}{beside}"
    lines.append(f"to train: {todo.flops:.3g} FLOPs, {time}")
    lines.append(f"disk: about {todo.disk_bytes / 1e9:.2g} GB while it runs")
    return "\n".join(lines)


def todo_json(todo: Todo) -> str:
    """What is to be trained: the document of `est-ds compare --dry-run --json`."""
    document: dict[str, Any] = {
        "study": todo.study,
        "done": todo.done,
        "to_train": [
            {"name": run.name, **{k: v for k, v in run.facts.items() if k != "values"}}
            for run in todo.runs
        ],
        "flops": todo.flops,
        "jobs": todo.places,
        "seconds": todo.wall_s,
        "disk_bytes": todo.disk_bytes,
    }
    return json.dumps(document, indent=1)


def expected_s(
    todo: Iterable[StudyRun],
    results: Results,
    per_flop: float | None = None,
    begun: Iterable[tuple[StudyRun, float]] = (),
) -> float | None:
    """How long runs take one after the other, with their starts, on this device: by the runs that
    are done, which had the same neighbours, or by the step times measured.

    Args:
        per_flop: seconds, where there are neither; None: then nothing is known.
        begun: runs that have started, with the share that is left of each.
    """
    device = device_name()
    rates = _s_per_flop(results, device)
    usual = median(rates.values()) if rates else per_flop
    times = results.times.arms if results.times and results.times.device == device else {}
    total = 0.0
    to_start = [(run, 1.0) for run in todo]
    for run, left in (*to_start, *begun):
        if not rates and run.arm in times:
            total += left * run.steps * times[run.arm].step_s
        elif usual is not None:
            total += left * run.flops.model * rates.get(run.arm, usual)
        else:
            return None
    return total + START_S * len(to_start)


def _s_per_flop(results: Results, device: str) -> dict[str, float]:
    """Of the latest run of every arm: the machine may have been busier before."""
    return {
        run.arm: run.steps * run.step_s / run.flops
        for run in results.runs.values()
        if run.step_s is not None and run.device == device
    }


def _disk_bytes(runs: Runs, todo: Iterable[StudyRun], places: int) -> float:
    """Two checkpoints of every run under way, with moments: 12 bytes a parameter; all if kept."""
    sizes = sorted((24.0 * runs.parameters(run) for run in todo), reverse=True)
    return sum(sizes if runs.file.study.keep_checkpoints else sizes[:places])
