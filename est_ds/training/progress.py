"""What rank 0 shows while training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from est_ds.ranks.world import say


class Progress:
    """The step, what is said of it, and the time left.

    Args:
        total: steps of the run.
        done: steps done before this process started.
        remaining: maps a step to the share of this process's work still to do after it. Steps of
            later phases cost more, so the time left goes by FLOPs, not by steps.
        shown: whether this process shows anything.
    """

    LINE_EVERY_S = 10.0

    def __init__(
        self, total: int, done: int, remaining: Callable[[int], float], shown: bool
    ) -> None:
        self._total, self._done, self._remaining = total, done, remaining
        self._started = self._last_line = time.monotonic()
        self._bar = None
        if shown and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
            )
            self._task = self._bar.add_task("starting", total=total, completed=done)
        self._shown = shown

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, tb: TracebackType | None):
        if self._bar:
            self._bar.stop()

    def step(self, step: int, text: str) -> None:
        """Shows that `step` is done, with a text on how, and the time left."""
        if not self._shown:
            return
        text += f"  {clock(self._seconds_left(step))} left"
        if self._bar:
            self._bar.update(self._task, completed=step + 1, description=text)
            return
        now, last = time.monotonic(), step + 1 == self._total
        if last or step == self._done or now - self._last_line >= self.LINE_EVERY_S:
            self._last_line = now
            say(f"step {step + 1}/{self._total}  {text}")

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._bar:
            self._bar.console.print(text, highlight=False)
        elif self._shown:
            say(text)

    def _seconds_left(self, step: int) -> float:
        remaining = self._remaining(step)
        spent = time.monotonic() - self._started
        return spent * remaining / (1.0 - remaining) if remaining < 1.0 else 0.0


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
