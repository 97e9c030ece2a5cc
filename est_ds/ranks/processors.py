"""Who used the processors of a node: this run's processes, or others."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

import psutil

from est_ds.ranks.gather import gathered_on_rank_0


@dataclass(frozen=True)
class Use:
    """Of the node on which other processes used most.

    Attributes:
        processors: that it has.
        others: that other processes used, on average; time that a hypervisor took counts too.
    """

    processors: int
    others: float


class UseSince:
    """The use of the processors since it was made. Every process has one and asks it together."""

    def __init__(self) -> None:
        self._before = _now()

    def read(self) -> Use | None:
        """On rank 0; None elsewhere."""
        since = [now - then for now, then in zip(_now(), self._before)]
        by_node: dict[str, list[list[float]]] = {}
        for node, own in gathered_on_rank_0((socket.gethostname(), since)):
            by_node.setdefault(node, []).append(own)
        if not by_node:
            return None
        # All processes of a node saw about the same wall-clock and the same busy seconds.
        others = [
            (processes[0][1] - sum(own for *_, own in processes)) / processes[0][0]
            for processes in by_node.values()
        ]
        return Use(psutil.cpu_count() or 1, max(0.0, *others))


def _now() -> tuple[float, float, float]:
    """Wall-clock, busy seconds of all processors of the node, and this process's own."""
    # A guest's seconds stand in its host's user time too.
    idle = ("idle", "iowait", "guest", "guest_nice")
    busy_s = sum(s for name, s in psutil.cpu_times()._asdict().items() if name not in idle)
    return time.perf_counter(), busy_s, time.process_time()
