"""The only reader of the launcher's environment, and what rank 0 alone says."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

# Process id of the `est-ds` that started the launcher on this machine.
STARTER = "EST_DS_STARTER"
PORT = 29500  # where rank 0 listens, if nothing else is said


@dataclass(frozen=True)
class World:
    """This process among the launched ones."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> World:
        """Reads the launcher's environment; one process when no launcher started it."""
        env = os.environ
        return cls(
            int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))
        )

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def launched() -> bool:
    """Whether a launcher started this process (RANK is set)."""
    return "RANK" in os.environ


def say(text: str) -> None:
    """Prints a line on rank 0, at once."""
    if World.from_environment().is_first:
        print(text, flush=True)


def end_with_starter(every_s: float = 1.0) -> None:
    """Ends this process when the `est-ds` that started the launcher is gone, however it went."""
    starter = os.environ.get(STARTER)
    if starter is None:
        return

    def watch() -> None:
        while True:
            time.sleep(every_s)
            try:
                os.kill(int(starter), 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
