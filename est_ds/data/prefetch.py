"""Batches read in a thread ahead of the step that trains on them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from est_ds.data.loader import Batches, Inputs, Portion
from est_ds.data.objectives.loss import Labels

AHEAD = 2  # steps; memory is this many steps' ids and labels of one replica


class Prefetched:
    """The micro-batches of one replica, step by step; a context that ends its thread.

    What a step reads is what `Batches.micro_batches` reads. The thread starts with the first
    micro-batch that is asked for, so that a pipe stage in the middle, which needs none, reads none.

    Args:
        batches: where they come from.
        end: the step after the last.
        portion: what this replica reads.
    """

    def __init__(self, batches: Batches, end: int, portion: Portion) -> None:
        self._batches, self._end, self._portion = batches, end, portion
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="est_ds-loader")
        self._coming: dict[int, Future[list[tuple[Inputs, Labels]]]] = {}

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def micro_batches(self, step: int) -> Iterator[tuple[Inputs, Labels]]:
        """The micro-batches of a step; of any step, but the steps in order are read ahead.

        Raises:
            Exception: whatever reading raised in the thread.
        """
        for other in [s for s in self._coming if not step <= s <= step + AHEAD]:
            self._coming.pop(other).cancel()
        for wanted in range(step, min(step + AHEAD + 1, self._end)):
            if wanted not in self._coming:
                self._coming[wanted] = self._pool.submit(self._read, wanted)
        yield from self._coming.pop(step).result()

    def _read(self, step: int) -> list[tuple[Inputs, Labels]]:
        found = list(self._batches.micro_batches(step, self._portion))
        # Memory that a GPU copies from by itself, while the step before still computes.
        return [_pinned(batch) for batch in found] if torch.cuda.is_available() else found


def _pinned(part: Tensor | tuple) -> Tensor | tuple:
    return tuple(map(_pinned, part)) if isinstance(part, tuple) else part.pin_memory()
