"""Measures the network between nodes with the backend that training will use; one process a node.

Bandwidths are in bytes per second and count as `nccl-tests` does: of a reduction the bus bandwidth,
2 (n - 1) / n x size / time, which does not depend on the number of nodes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from est_ds.doctor.facts import existing_parent
from est_ds.ranks.gather import gathered, of_rank_0
from est_ds.ranks.meeting import choose_interface, meet
from est_ds.ranks.world import World

LIMIT_S = 60.0  # to come together, and for each operation
LARGEST_BYTES = 256 * 2**20
AIM_S = 1.0  # for one measurement


def join(rank: int, nodes: int, master: str, port: int) -> None:
    """Comes together with the other nodes.

    Raises:
        Failure: some are missing, or node 0 cannot be reached.
        UserError: versions differ.
    """
    os.environ.update(MASTER_ADDR=master, MASTER_PORT=str(port))
    meeting = meet(World(rank, nodes, 0), LIMIT_S)
    if (interface := choose_interface(os.environ, meeting)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore("doctor", meeting.store.clone()),
        rank=rank,
        world_size=nodes,
        timeout=timedelta(seconds=LIMIT_S),
    )


def measure(run_dir: str | None) -> list[dict[str, Any]]:
    """Every node's measurements, in their order. Every node calls it.

    Returns:
        all_reduce (bus bandwidth), and between each node and node 0: bandwidth, latency_s, skew_s
        (this clock minus node 0's); shares: whether it sees node 0's files in the run directory.
    """
    mine = {"all_reduce": _all_reduce(), **_to_first(), "skew_s": _skew()}
    return gathered(mine | {"shares": None if run_dir is None else _shares(run_dir)})


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    if _device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _agreed(seconds: float) -> float:
    """The longest time of all nodes, so that all choose the same sizes."""
    longest = torch.tensor(seconds, device=_device())
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.item()


def _bandwidth(work: Callable[[torch.Tensor], Any]) -> float:
    """Bytes per second at a size that takes about `AIM_S` in all."""
    size = 2**20
    while True:
        data = torch.zeros(size // 4, device=_device())
        dist.barrier()
        work(data)  # the first opens connections
        took_s = _agreed(min(_timed(lambda: work(data)) for _ in range(2)))
        if size >= LARGEST_BYTES or took_s > AIM_S / 8:
            return size / took_s
        size *= 4


def _all_reduce() -> float:
    nodes = dist.get_world_size()
    return 2 * (nodes - 1) / nodes * _bandwidth(dist.all_reduce)


def _to_first() -> dict[str, float | None]:
    """Bandwidth and latency between node 0 and each other, one after the other."""
    mine: dict[str, float | None] = {"bandwidth": None, "latency_s": None}
    for other in range(1, dist.get_world_size()):
        bandwidth = _bandwidth(lambda data: _pass(data, other))
        ball = torch.zeros(1, device=_device())
        times = [
            _timed(lambda: (_pass(ball, other), _pass(ball, other, back=True))) for _ in range(30)
        ]
        if dist.get_rank() == other:
            mine = {"bandwidth": bandwidth, "latency_s": statistics.median(times) / 2}
    return mine


def _pass(data: torch.Tensor, other: int, back: bool = False) -> None:
    source, target = (other, 0) if back else (0, other)
    if dist.get_rank() == source:
        dist.send(data, target)
    elif dist.get_rank() == target:
        dist.recv(data, source)


def _skew() -> float:
    """This clock minus node 0's, as good as a barrier is sharp."""
    found = []
    for _ in range(5):
        dist.barrier()
        now = torch.tensor(time.time(), dtype=torch.float64, device=_device())
        first = now.clone()
        dist.broadcast(first, 0)
        found.append((now - first).item())
    return statistics.median(found)


def _shares(run_dir: str) -> bool:
    """Whether a file that node 0 writes where the run directory will be is seen here."""
    token = of_rank_0(os.urandom(6).hex())
    file = existing_parent(run_dir) / f".est-ds-doctor-{token}"
    if dist.get_rank() == 0:
        try:
            file.touch()
        except OSError:
            pass  # the facts say that it cannot be written
    dist.barrier()
    seen = _seen(file)
    dist.barrier()
    if dist.get_rank() == 0:
        file.unlink(missing_ok=True)
    return seen


def _seen(file: Path) -> bool:
    """NFS may show a new file a little later."""
    for _ in range(10):
        if file.name in os.listdir(file.parent):
            return True
        time.sleep(0.3)
    return False
