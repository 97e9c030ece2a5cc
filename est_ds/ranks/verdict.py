"""Why a run came to a halt, from what its processes last said of themselves."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

# A peer that has gone: its end is the cause, and this only how gloo and NCCL tell of it.
BROKEN = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|timed out|timeout|"
    r"no route to host|remote process exited|unhandled system error|connect.*failed|"
    r"gloo/transport|ncclRemoteError|ncclSystemError",
    re.IGNORECASE,
)
WAITING = ("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/pipe/p2p")
PYTHON = str(Path(os.__file__).parent)
SHOWN = 8


@dataclass(frozen=True)
class Record:
    """What one process is at.

    Attributes:
        done: steps done.
        doing: starting, training, evaluating or saving.
        where: the source line where its main thread is; None while it waits for other processes.
        error: what it failed of; None while it runs, or if only a connection broke.
    """

    done: int
    doing: str
    where: str | None = None
    error: str | None = None

    def as_dict(self) -> dict:
        return asdict(self)


def where_main_is(thread: int) -> str | None:
    """The line where a thread is; None while it waits in communication."""
    frame: FrameType | None = sys._current_frames().get(thread)
    if frame is None:
        return "its end"
    stack = traceback.extract_stack(frame)
    if any(part in f.filename.replace("\\", "/") for f in stack for part in WAITING):
        return None
    # Not where Python's own library waits, for a file or a thread, but who asked it to.
    last = next((f for f in reversed(stack) if not _is_pythons(f.filename)), stack[-1])
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno} ({last.name})"


def _is_pythons(file: str) -> bool:
    return file.startswith((PYTHON, "<frozen")) and "site-packages" not in file


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error only says that another process has gone."""
    return isinstance(error, (RuntimeError, ConnectionError)) and bool(BROKEN.search(str(error)))


def verdict(
    reason: str,
    host_of: Callable[[int], str],
    reports: dict[int, Record],
    missing: list[int],
    last: dict[int, Record],
) -> str:
    """One paragraph: why the run ends, and the processes that are the cause.

    Args:
        host_of: the host of a rank; asked for those that are named.
        reports: of the ranks that answered when the run came to a halt.
        missing: the ranks that did not.
        last: the latest record of these, where there is one.
    """
    lines = [f"est-ds: failed: {reason}"]
    guilty = _guilty(reports, missing)
    for rank in guilty[:SHOWN]:
        record = reports.get(rank) or last.get(rank)
        at = f"last step {record.done}, {record.doing}" if record else "it has told no step yet"
        lines.append(f"  rank {rank} on {host_of(rank)} ({at}) {_fault(reports.get(rank))}")
    if len(guilty) > SHOWN:
        lines.append(f"  and {len(guilty) - SHOWN} more")
    others = [record.done for rank, record in reports.items() if rank not in guilty]
    if others:
        them = "it" if len(guilty) == 1 else "them"
        count = "1 other" if len(others) == 1 else f"{len(others)} others"
        lines.append(f"  {count} waited for {them}, at step {max(others)}")
    lines.append("  start the run again: it goes on from its last checkpoint")
    return "\n".join(lines)


def _guilty(reports: dict[int, Record], missing: list[int]) -> list[int]:
    failed = [rank for rank, record in reports.items() if record.error]
    if failed or missing:
        return sorted(failed) or missing
    least = min(record.done for record in reports.values())
    behind = [rank for rank, record in reports.items() if record.done == least]
    busy = [rank for rank in behind if reports[rank].where is not None]
    return sorted(busy or behind)


def _fault(record: Record | None) -> str:
    if record is None:
        return "does not answer: it was killed or stopped, or its host or network is gone"
    if record.error:
        return f"failed: {record.error}"
    if record.where:
        return f"is held up at {record.where}"
    return "waits for other processes"
