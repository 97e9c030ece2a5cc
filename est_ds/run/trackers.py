"""Trackers show what `metrics.jsonl` says: TensorBoard, W&B, MLflow, trackio (`log.to`).

Each has a thread of its own on rank 0: no training waits for one, or ends with one. x is the number
of optimizer steps done. No point is sent twice: `trackers/NAME.json` in the run directory says what
was sent, and by which name the tracker knows the run. A start first sends what is missing, from
`metrics.jsonl`. What a kill or a rollback has trained anew was sent before and is the same, so that
it is not sent again; but TensorBoard, which can hide what was there, gets it anew.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from est_ds.config.run_config import RunConfig
from est_ds.config.strict import Stored
from est_ds.errors import error_line
from est_ds.plans.methods.base import Method
from est_ds.run.tracker_kinds import Tracker, describe_run, make_trackers

FOLDER = "trackers"


@dataclass(frozen=True)
class Point:
    """Figures of one x.

    Attributes:
        kind: `train`, `eval`, `boundary/before` or `boundary/after`; an x has at most one of each.
        done: optimizer steps done: x.
        figures: numbers by their names, which begin with the kind.
    """

    kind: str
    done: int
    figures: dict[str, float]


class Mark(Stored):
    """What a tracker has of a run.

    Attributes:
        run: the name by which it knows the run.
        sent: of each kind of points the last x that was sent. It is written before the point is
            sent, so that a kill can lose the point on its way, and can double none.
    """

    run: str
    sent: dict[str, int] = {}


def point_of(line: dict[str, Any], method: Method) -> Point | None:
    """Returns the figures of a line of `metrics.jsonl`; None if it has none."""
    step = line["step"]
    if "loss" in line:
        more = {
            "flops_ratio": line["flops_active"] / line["flops_dense"],
            "phase": method.phase_at(step),
        }
        return _point("train", step + 1, {k: v for k, v in line.items() if k != "start"} | more)
    if "eval_loss" in line:
        values = {name.removeprefix("eval_"): value for name, value in line.items()}
        by_name = {f"loss/{name}": loss for name, loss in values.pop("losses", {}).items()}
        return _point("eval", step + 1, values | by_name)
    if "boundary" in line:  # before the step with that number is trained
        values = {name: line[name] for name in ("full_loss", "subnetwork_loss")}
        return _point(f"boundary/{line['boundary']}", step, values)
    return None


def _point(kind: str, done: int, values: dict[str, Any]) -> Point:
    numbers = {
        f"{kind}/{name}": float(value)
        for name, value in values.items()
        if name != "step" and isinstance(value, (int, float))
    }
    return Point(kind, done, {name: x for name, x in numbers.items() if math.isfinite(x)})


class Trackers:
    """All trackers of a run; to be made on rank 0 alone.

    Args:
        start: steps done by the checkpoint from which this start goes on.
        lines: the lines of `metrics.jsonl` up to there.
        note: shows a line.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        start: int,
        lines: Callable[[], Iterable[dict[str, Any]]],
        note: Callable[[str], None],
    ) -> None:
        self._method, self._note = method, note
        made = make_trackers(config)
        self._limit_s = max((tracker.limit_s for tracker in made), default=0.0)
        about = describe_run(config, method.phases) if made else {}
        self._threads = [_Thread(tracker, about, start) for tracker in made]
        for line in lines() if made else ():
            self.send(line)

    def send(self, line: dict[str, Any]) -> None:
        """Sends the figures of a line of `metrics.jsonl`."""
        self._warn()
        if self._threads and (point := point_of(line, self._method)):
            for thread in self._threads:
                thread.send(point)

    def go_back(self, done: int) -> None:
        """Says that what comes after `done` steps is trained anew."""
        for thread in self._threads:
            thread.go_back(done)

    def close(self, ended_well: bool) -> None:
        """Waits until all is sent, but not for long.

        Args:
            ended_well: false of a run that was interrupted, or failed.
        """
        for thread in self._threads:
            thread.end(ended_well)
        end = time.monotonic() + self._limit_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                thread.error = f"not ready {self._limit_s:.0f} s after the end"
        self._warn()

    def _warn(self) -> None:
        """Says once of each tracker that it failed, and leaves it alone from then on."""
        for thread in [thread for thread in self._threads if thread.error]:
            self._threads.remove(thread)
            self._note(
                f"warning: log.to={thread.name} failed after step {thread.last}: {thread.error}. "
                f"Nothing more is sent there; the next start of this run sends what is missing."
            )


class _Thread(threading.Thread):
    """Calls a tracker, until it fails.

    Attributes:
        error: why it failed.
    """

    def __init__(self, tracker: Tracker, about: dict[str, Any], start: int) -> None:
        super().__init__(name=tracker.name, daemon=True)
        self.error: str | None = None
        self._tracker, self._file = tracker, tracker.directory / FOLDER / f"{tracker.name}.json"
        self._mark = Mark(run=tracker.new_name)
        self._held: list[Point] = []  # of one x
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._calls.put(partial(self._begin, about, start))
        self._ended_well = False
        self.start()

    @property
    def last(self) -> int:
        """The last step of which the tracker has a point; 0 if there is none."""
        return max(self._mark.sent.values(), default=0)

    def send(self, point: Point) -> None:
        self._calls.put(partial(self._send, point))

    def go_back(self, done: int) -> None:
        if self._tracker.hides:
            self._calls.put(partial(self._go_back, done))

    def end(self, ended_well: bool) -> None:
        self._ended_well = ended_well
        self._calls.put(None)

    def run(self) -> None:
        try:
            for call in iter(self._calls.get, None):
                call()
            self._send_held()
            self._tracker.finish(self._ended_well)
        except BaseException as e:  # whatever a library, a disk or a network raises
            self.error = error_line(e)

    def _begin(self, about: dict[str, Any], done: int) -> None:
        known = self._file.exists()
        if known:
            self._mark = Mark.model_validate_json(self._file.read_text())
        run = self._tracker.start(self._mark.run if known else None, done)
        marked = self._mark.sent
        sent = self._until(done) if self._tracker.hides else self._tracker.sent(marked)
        self._write(Mark(run=run, sent=sent))
        self._tracker.describe(about, is_new=not known)

    def _go_back(self, done: int) -> None:
        self._tracker.hide_after(done)
        self._write(Mark(run=self._mark.run, sent=self._until(done)))

    def _until(self, done: int) -> dict[str, int]:
        return {kind: min(last, done) for kind, last in self._mark.sent.items()}

    def _send(self, point: Point) -> None:
        if self._held and self._held[0].done != point.done:
            self._send_held()
        self._held.append(point)
        if not self._tracker.in_rows:
            self._send_held()

    def _send_held(self) -> None:
        former, held = self._mark, self._held
        new = [point for point in held if point.done > former.sent.get(point.kind, -1)]
        self._held = []
        if not new:
            return
        self._write(Mark(run=former.run, sent=former.sent | {p.kind: p.done for p in new}))
        try:
            figures = {name: x for point in new for name, x in point.figures.items()}
            self._tracker.log(figures, new[0].done)
        except Exception:
            self._write(former)
            raise

    def _write(self, mark: Mark) -> None:
        """Does not wait for the disk: it is for kills of the process."""
        self._mark = mark
        self._file.parent.mkdir(exist_ok=True)
        beside = self._file.with_suffix(".partial")
        beside.write_text(mark.model_dump_json() + "\n")
        os.replace(beside, self._file)
