"""Python values from rank to rank; every rank calls these together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from est_ds.errors import UserError

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """Returns every rank's value, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gathered_on_rank_0(value: T) -> list[T]:
    """Returns every rank's value on rank 0, and nothing elsewhere."""
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None)
    return values


def of_rank_0(value: T) -> T:
    """Returns rank 0's value."""
    values: list[Any] = [value]
    dist.broadcast_object_list(values)
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
            everyone = gathered((done, error))
            for _, found in everyone:
                if isinstance(found, UserError):
                    raise found
            if error:
                raise error
            if all(done for done, _ in everyone):
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
