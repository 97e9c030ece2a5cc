"""The only reader of the launcher's environment, and what rank 0 alone says."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """This process among the launched ones."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def launched() -> bool:
    """Whether a launcher started this process (RANK is set)."""
    return "RANK" in os.environ


def world() -> World:
    """The world from the environment; one process when no launcher started it."""
    env = os.environ
    return World(
        int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))
    )


def say(text: str) -> None:
    """Prints a line on rank 0, at once."""
    if world().is_first:
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints a warning on rank 0's standard error."""
    if world().is_first:
        print(f"est-ds: warning: {text}", file=sys.stderr, flush=True)
