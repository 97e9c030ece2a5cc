"""Where the ranks leave what they have written of a checkpoint: at the store on rank 0."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch.distributed as dist

from est_ds.disk import File
from est_ds.ranks.board import AT_ONCE, put, remove, take
from est_ds.ranks.meeting import latest_store

Shapes = dict[str, tuple[int, ...]]


class Board:
    """One for all checkpoints; every rank has one.

    Args:
        store: where; by which this process has met the others if None.
    """

    def __init__(self, rank: int, num_ranks: int, store: dist.Store | None = None) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self._store = store or latest_store()
        self._begun = 0
        self._missing: list[str] = []  # on rank 0

    def begin(self) -> None:
        """Begins another checkpoint."""
        self._begun += 1
        self._missing = self._keys() if self._rank == 0 else []

    def leave(self, file: File, shapes: Shapes) -> None:
        """Says that this rank has written its file; on any thread.

        Args:
            shapes: of parameters that no other rank says, by their names.
        """
        written = json.dumps({"file": file.model_dump(), "parameters": shapes})
        put(self._store, self._key(self._rank), written.encode())

    def is_full(self) -> bool:
        """Whether every rank has written its file; on rank 0. Mostly one request."""
        while self._missing and self._store.check(self._missing[:AT_ONCE]):
            del self._missing[:AT_ONCE]
        return not self._missing

    def read(self) -> Iterator[tuple[File, Shapes]]:
        """Yields what every rank has left, in their order; on rank 0, when all have."""
        for text in take(self._store, self._keys()):
            written = json.loads(text)
            yield File(**written["file"]), written["parameters"]

    def clear(self) -> None:
        """Takes away what this rank has left, once the checkpoint is complete."""
        remove(self._store, self._key(self._rank))

    def _key(self, rank: int) -> str:
        return f"est_ds/written/{self._begun}/{rank}"

    def _keys(self) -> list[str]:
        return [self._key(rank) for rank in range(self._num_ranks)]
