"""The only reader of the launcher's environment, and what rank 0 alone says."""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass

from est_ds.errors import UserError

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
        """Reads the launcher's environment; one process when no launcher started it.

        Raises:
            UserError: what the launcher sets beside RANK is missing, or is no such number.
        """
        if not launched():
            return cls(0, 1, 0)
        size = _number("WORLD_SIZE", 1, 10**6)
        rank = _number("RANK", 0, size - 1)
        return cls(rank, size, _number("LOCAL_RANK", 0, size - 1, 0 if size == 1 else None))

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def launched() -> bool:
    """Whether a launcher started this process (RANK is set)."""
    return "RANK" in os.environ


def meeting_place(world: World) -> tuple[str, int]:
    """Address and port of rank 0; for one process alone port 0, which is any.

    Raises:
        UserError: the launcher has set none.
    """
    alone = world.size == 1
    address = os.environ.get("MASTER_ADDR", "127.0.0.1" if alone else "")
    if not address:
        raise UserError(_wrong("MASTER_ADDR", "the address of rank 0"))
    return address, _number("MASTER_PORT", 0 if alone else 1, 65535, 0 if alone else None)


def _number(name: str, least: int, most: int, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    # No more digits than any of them can have: Python refuses to convert thousands of them.
    if re.fullmatch("[0-9]{1,9}", text or "") and least <= int(text or "") <= most:
        return int(text or "")
    raise UserError(_wrong(name, f"a whole number from {least} to {most}"))


def _wrong(name: str, allowed: str) -> str:
    text = os.environ.get(name)
    found = "is not set" if text is None else f"is {text[:40]!r}"
    return (
        f"{name} {found} in the environment, which a launcher has set up (RANK is there); it must "
        f"be {allowed}. Unset RANK and let est-ds start its processes, or use a launcher that sets "
        f"RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."
    )


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
