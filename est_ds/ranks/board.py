"""What ranks leave at the store on rank 0, and how they look for it.

Every request is rank 0's work, so that no rank asks for what every other one has left: rank 0 alone
gathers, and publishes what all need under one key. Sizes here are linear in the number of ranks.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch.distributed as dist

LOOKS_PER_S = 4000  # that all ranks together may ask rank 0 to answer
AT_ONCE = 1024  # keys in a request
PIECE_BYTES = 4 << 20  # the store refuses values above 8 MiB

T = TypeVar("T")


def look_every_s(least_s: float, num_ranks: int) -> float:
    """Seconds between two looks of one of `num_ranks` ranks, by which rank 0 keeps up with all."""
    return max(least_s, num_ranks / LOOKS_PER_S)


def wait_for(store: dist.Store, key: str, num_ranks: int, until: float) -> bool:
    """Waits for a key that all ranks wait for; whether it came.

    Not by the store's own wait, in which no signal handler runs.

    Args:
        until: by `time.monotonic()`.
    """
    every_s = look_every_s(0.1, num_ranks)
    time.sleep(every_s * random.random() if every_s > 0.1 else 0.0)  # not all at one moment
    while not store.check([key]):
        if time.monotonic() > until:
            return False
        time.sleep(every_s)
    return True


def within(limit_s: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises, on a thread: torch waits without end for a store whose process
    was stopped or whose host has gone, and signals would not be heard meanwhile.

    Raises:
        TimeoutError: it took longer; the thread is left behind.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as e:  # for the caller, whatever it is
            done.set_exception(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise TimeoutError(f"not within {limit_s:.0f} s")
    return done.result()


def absent(store: dist.Store, keys: Sequence[str]) -> list[str]:
    """Those of the keys that are not there; few requests where nearly all or none are."""
    if len(keys) > AT_ONCE:
        parts = (keys[i : i + AT_ONCE] for i in range(0, len(keys), AT_ONCE))
        return [key for part in parts for key in absent(store, part)]
    if not keys or store.check(list(keys)):
        return []
    if len(keys) == 1:
        return list(keys)
    half = len(keys) // 2
    return absent(store, keys[:half]) + absent(store, keys[half:])


def present(store: dist.Store, keys: Sequence[str]) -> dict[str, bytes]:
    """Those of the keys that are there, with their values."""
    missing = set(absent(store, keys))
    found = [key for key in keys if key not in missing]
    return dict(zip(found, read_all(store, found)))


def read_all(store: dist.Store, keys: Sequence[str]) -> list[bytes]:
    """The values of keys that are there."""
    parts = (list(keys[i : i + AT_ONCE]) for i in range(0, len(keys), AT_ONCE))
    return [value for part in parts for value in store.multi_get(part)]


def put(store: dist.Store, key: str, value: bytes) -> None:
    """Leaves a value of any size, and returns when it is there: other ranks told by other means
    find it."""
    pieces = [value[i : i + PIECE_BYTES] for i in range(0, len(value), PIECE_BYTES)] or [b""]
    for number, piece in enumerate(pieces[1:], start=1):
        store.set(f"{key}/{number}", piece)
    store.set(key, len(pieces).to_bytes(4, "little") + pieces[0])
    store.check([key])  # the store answers in turn; a set alone is not answered


def remove(store: dist.Store, key: str) -> None:
    """Takes away a value that was `put` under a key."""
    store.delete_key(key)
    number = 1
    while store.delete_key(f"{key}/{number}"):
        number += 1


def take(store: dist.Store, keys: Sequence[str]) -> list[bytes]:
    """Values that were `put` under keys."""
    found = []
    for key, first in zip(keys, read_all(store, keys)):
        count = int.from_bytes(first[:4], "little")
        rest = read_all(store, [f"{key}/{number}" for number in range(1, count)])
        found.append(b"".join([first[4:], *rest]))
    return found
