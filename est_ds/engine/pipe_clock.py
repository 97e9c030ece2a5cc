"""How evenly the pipe stages share the work, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass

from est_ds.engine.patches import replace_instructions


@dataclass(frozen=True)
class PipeShares:
    """Of the steps since the last call.

    Attributes:
        busy: of every pipe stage, the share of the time in which it computes.
    """

    busy: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """The busiest stage over the mean; 1 is perfect."""
        return max(self.busy) * len(self.busy) / sum(self.busy)

    @property
    def waiting(self) -> float:
        """The mean share of the time that is not computing: bubble, communication, optimizer."""
        return 1.0 - sum(self.busy) / len(self.busy)


class PipeClock:
    """Times the forward and backward passes of this process's pipe stage.

    On a GPU by events, so that nothing waits for them during a step.

    Args:
        engine: DeepSpeed's pipeline engine, whose instructions are timed from now on.
    """

    def __init__(self, engine: Any) -> None:
        self._stage, self._num_stages = engine.stage_id, engine.num_stages
        self._device = engine.device
        self._marks: list[tuple[Any, Any]] = []
        self._busy_s = self._total_s = 0.0
        passes = (ForwardPass, BackwardPass)
        timed = {kind: self._timed(engine._INSTRUCTION_MAP[kind]) for kind in passes}
        replace_instructions(engine, timed)

    def step_done(self, step_s: float) -> None:
        """Takes in a step, after its loss was read."""
        self._total_s += step_s
        self._busy_s += sum(_seconds(start, end) for start, end in self._marks)
        self._marks.clear()

    def drop(self) -> None:
        """Forgets what was not a training step."""
        self._marks.clear()

    def shares(self) -> PipeShares | None:
        """Since the last call; None if no step was done. Every process calls it."""
        sums = torch.zeros(self._num_stages, 2, dtype=torch.float64, device=self._device)
        sums[self._stage] = torch.tensor([self._busy_s, self._total_s])
        dist.all_reduce(sums)
        self._busy_s = self._total_s = 0.0
        if not sums[:, 1].any():
            return None
        busy = (sums[:, 0] / sums[:, 1]).tolist()
        return PipeShares(tuple(busy))

    def _timed(self, execute: Callable[..., None]) -> Callable[..., None]:
        def timed(engine: Any, *arguments: Any, **named: Any) -> None:
            start = _mark()
            execute(engine, *arguments, **named)
            self._marks.append((start, _mark()))

        return timed


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000.0
