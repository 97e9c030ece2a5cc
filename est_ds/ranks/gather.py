"""Python values from rank to rank; every rank calls these together."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from est_ds.errors import UserError
from est_ds.ranks.board import put, take
from est_ds.ranks.meeting import latest_store

T = TypeVar("T")


class Exchange:
    """Values between rank 0 and each other rank, by the store: rank 0 holds all of them once, and
    no other rank any but its own.

    Every rank makes the same calls.

    Args:
        together: returns when every rank has called it, or raises if one has gone.
    """

    def __init__(
        self, store: dist.Store, rank: int, num_ranks: int, together: Callable[[], Any]
    ) -> None:
        self.store, self._rank, self._num_ranks = store, rank, num_ranks
        self._together, self._calls = together, 0

    def gathered(self, value: T) -> list[T]:
        """Every rank's value on rank 0, and nothing elsewhere."""
        place = self._place()
        put(self.store, f"{place}/{self._rank}", pickle.dumps(value))
        self._together()
        if self._rank:
            return []
        keys = [f"{place}/{rank}" for rank in range(self._num_ranks)]
        return [pickle.loads(text) for text in take(self.store, keys)]

    def dealt(self, values: Iterable[T] | None) -> T:
        """This rank's one of the values that rank 0 gives, in the order of the ranks."""
        place = self._place()
        if values is not None:
            for rank, value in enumerate(values):
                put(self.store, f"{place}/{rank}", pickle.dumps(value))
        self._together()
        return pickle.loads(take(self.store, [f"{place}/{self._rank}"])[0])

    def _place(self) -> str:
        """What the keys of a call begin with. They are used again at the next but one: by then who
        reads them has been in the meeting of all that is between, and has read."""
        self._calls += 1
        return f"est_ds/values/{self._calls % 2}"


_exchanges: list[Exchange] = []  # the last is that of the process group


def _exchange() -> Exchange:
    store = latest_store()
    if not _exchanges or _exchanges[-1].store is not store:
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        _exchanges.append(Exchange(store, rank, num_ranks, lambda: largest(0)))
    return _exchanges[-1]


def gathered_on_rank_0(value: T) -> list[T]:
    """Returns every rank's value on rank 0, and nothing elsewhere."""
    return _exchange().gathered(value)


def dealt(values: Iterable[T] | None) -> T:
    """Returns this rank's one of the values that rank 0 gives, one for each rank."""
    return _exchange().dealt(values)


def gathered(value: T) -> list[T]:
    """Returns every rank's value; for one rank of each node, as it grows with their square."""
    return of_rank_0(gathered_on_rank_0(value))


def of_rank_0(value: T) -> T:
    """Returns rank 0's value."""
    return _of_rank(0, value)


def first_of_all(value: T | None) -> tuple[int, T] | None:
    """Returns the lowest rank that gives a value, and the value; None if none does. One number is
    reduced then, and nothing else."""
    size = dist.get_world_size()
    first = size - largest(0 if value is None else size - dist.get_rank())
    return None if first == size else (first, _of_rank(first, value))


def _of_rank(rank: int, value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, rank)
    return values[0]


def on_threads(work: Callable[[], object] | None, goes_on: Callable[[], None]) -> None:
    """Runs something long on a thread of each rank that has something to do, until all are done.

    Args:
        work: None: this rank has nothing to do.
        goes_on: called every second while any rank works.

    Raises:
        UserError: it raised one on some rank; all raise it.
        Exception: it raised another on this rank.
    """
    with ThreadPoolExecutor(1) as pool:
        working: Future[object] | None = pool.submit(work) if work else None
        while True:
            goes_on()
            done = working is None or bool(wait([working], 1.0).done)
            error = working.exception() if working and done else None
            fault = first_of_all(error if isinstance(error, UserError) else None)
            if fault:
                raise fault[1]
            if error:
                raise error
            if not largest(int(not done)):
                return


def is_same_on_all(text: str) -> bool:
    """Returns whether every rank gives the same text; two numbers are reduced, whatever it is."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little", signed=True) >> 1  # its negative fits too
    least = torch.tensor([number, -number], device=_device())
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least[0]) == -int(least[1])


def largest(number: int) -> int:
    """Returns the largest of all ranks' numbers."""
    most = torch.tensor(number, device=_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _device() -> str:
    """Where tensors lie that the backend reduces."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
