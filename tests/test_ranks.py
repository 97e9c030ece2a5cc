"""Ranks find and tell each other by rank 0, whose work is linear in their number.

`tests/benchmarks/ranks.py` measures it with thousands.
"""

from __future__ import annotations

import os
import random
import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from est_ds.checkpoints import resume
from est_ds.checkpoints.board import Board
from est_ds.checkpoints.index import FILE, Damaged, Index, read_index
from est_ds.checkpoints.reader import Checkpoint, contents
from est_ds.checkpoints.state import State
from est_ds.disk import File
from est_ds.engine.start import leave_processes, start_processes
from est_ds.errors import Failure, UserError
from est_ds.launch.placement import free_port
from est_ds.ranks import meeting
from est_ds.ranks.board import PIECE_BYTES, absent, present, put, take
from est_ds.ranks.gather import Exchange
from est_ds.ranks.world import World
from forks import fork, wait
from workers import ROOT, launched

STATES = ("weight", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def store() -> dist.TCPStore:
    limit = timedelta(seconds=20)
    return dist.TCPStore("localhost", 0, is_master=True, timeout=limit, wait_for_workers=False)


def at_once(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What every rank's thread returns or raises, by rank."""
    with ThreadPoolExecutor(size) as pool:
        asked = [pool.submit(work, rank) for rank in range(size)]
        return [done.exception() or done.result() for done in asked]


def exchanges(store: dist.Store, size: int) -> list[Exchange]:
    together = threading.Barrier(size)
    return [Exchange(store, rank, size, together.wait) for rank in range(size)]


@pytest.fixture
def meet(monkeypatch) -> Callable[..., list[Any]]:
    """Lets threads meet, each with a host and versions of its own."""
    own = threading.local()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(meeting, "host_name", lambda: own.host)
    monkeypatch.setattr(meeting, "comparable_versions", lambda: own.versions)
    monkeypatch.setattr(meeting, "_stores", [])

    def meet(hosts: list[str], *, limit_s: float = 60, size: int = 0, versions: str = "") -> list:
        def one(rank: int) -> meeting.Meeting:
            own.host, own.versions = hosts[rank], {"torch": (versions or "1" * len(hosts))[rank]}
            return meeting.meet(World(rank, size or len(hosts), 0), limit_s)

        return at_once(len(hosts), one)

    return meet


def test_a_rank_knows_the_ranks_of_its_host_and_looks_up_the_others(meet):
    hosts = ["a", "a", "b", "b"]
    met = meet(hosts)
    for rank, found in enumerate(met):
        assert (found.host, found.first_host) == (hosts[rank], "a")
        assert found.near == dict.fromkeys(((0, 1), (2, 3))[rank // 2], os.getpid())
        assert [meeting.host_of(found.store, other) for other in range(4)] == hosts
        assert found.addresses == ()  # of the loopback, which leads nowhere
    assert len({found.token for found in met}) == 1


def test_ranks_that_do_not_come_are_named_by_all_that_did(meet):
    for found in meet(["a", "b"], limit_s=1, size=4):
        assert isinstance(found, Failure)
        assert "2 of 4 processes did not come within 1 s: ranks 2, 3;" in str(found)


def test_another_version_is_named_by_all(meet):
    for found in meet(["a", "b", "c"], versions="121"):
        assert isinstance(found, UserError)
        assert "torch is 1 on a and 2 on b;" in str(found)


@pytest.mark.parametrize(
    ("limits", "ranks", "raised_to"),
    [
        ((1024, 25_000), 4096, 5 * 4096 + 1024),
        ((1024, 1024), 4, None),
        ((1024, 4096), 700, 4096),
        ((256, -1), 4, 20 + 1024),
        ((-1, -1), 4096, None),
    ],
)
def test_rank_0_may_open_a_file_for_every_connection(limits, ranks, raised_to, monkeypatch):
    allowed: list[int] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: allowed.append(both[0]))
    meeting._allow_sockets(meeting.SOCKETS * ranks)
    assert [n for n in allowed if n != limits[0]] == [raised_to] * (raised_to is not None)


def test_a_limit_that_is_too_low_for_all_connections_ends_the_start(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 20_000))
    with pytest.raises(Failure, match=r"may open 20000 files \(ulimit -Hn\).*raise that limit"):
        meeting._allow_sockets(meeting.SOCKETS * 10_240)


def test_addresses_are_few_and_lead_to_hosts():
    everyone = [{"address": f"10.0.0.{i // 2}"} for i in range(100)]
    everyone[0]["address"] = everyone[1]["address"] = "127.0.1.1"
    everyone[4]["address"] = None
    assert meeting._away(everyone) == [f"10.0.0.{i}" for i in range(1, 9)]


def test_absent_keys_are_found_among_many(store):
    keys = [f"absent/{i}" for i in range(3000)]
    gone = set(random.Random(0).sample(keys, 7))
    store.multi_set([k for k in keys if k not in gone], ["x"] * (len(keys) - len(gone)))
    assert set(absent(store, keys)) == gone
    assert present(store, keys[:3]) == {k: b"x" for k in keys[:3] if k not in gone}


def test_values_of_any_size_go_to_rank_0_and_back(store):
    size, large = 3, bytes(3 * PIECE_BYTES)
    ranks = exchanges(store, size)

    def one(rank: int) -> list[Any]:
        seen = []
        for turn in range(5):  # the keys are used again
            everyone = ranks[rank].gathered((rank, turn, large[: rank * PIECE_BYTES + turn]))
            answers = [(r, t, len(b)) for r, t, b in everyone] if everyone else None
            seen.append((everyone == [], ranks[rank].dealt(answers)))
        return seen

    for rank, seen in enumerate(at_once(size, one)):
        expected = [(rank, turn, rank * PIECE_BYTES + turn) for turn in range(5)]
        assert seen == [(rank > 0, value) for value in expected]
    put(store, "large", large)
    assert take(store, ["large"]) == [large]


def joined_with_gpus() -> None:
    """Joins, on a host that seems to have two GPUs; says what was done to them, and when."""
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
    torch.cuda.set_device = lambda number: print(f"took {number}, joined {dist.is_initialized()}")
    start_processes(World.from_environment())
    print(f"joined {dist.is_initialized()}")
    leave_processes()


def test_a_process_takes_its_gpu_before_it_talks_to_others(tmp_path, monkeypatch):
    """By NCCL's rules its tensors lie there, also those of what ranks exchange at the start."""
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = [
        fork(joined_with_gpus, (), (log, log), ROOT, environment)
        for log, environment in zip(logs, launched(2))
    ]
    assert wait(ranks, 120) == [0, 0], logs[0].read_text()
    for rank, log in enumerate(logs):
        assert f"took {rank}, joined False\njoined True\n" in log.read_text()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="LOCAL_RANK=2: this process sees 2 GPUs"):
        start_processes(World(2, 3, 2))


def test_what_ranks_have_written_is_left_once_and_taken_away(store, monkeypatch):
    monkeypatch.setattr("est_ds.ranks.board.PIECE_BYTES", 64)  # so that it is left in pieces
    kept = {store.num_keys()}
    for save in range(4):
        if save % 2 == 0:  # another run in the same processes
            boards = [Board(rank, 3, store) for rank in range(3)]
        for board in boards:
            board.begin()
        for rank in (2, 0, 1):
            assert not boards[0].is_full()
            shapes = {"w": (2, save)} if rank == 0 else {}
            boards[rank].leave(File(bytes=save, sha256=f"{rank}" * 64), shapes)
        assert boards[0].is_full()
        files, shapes = zip(*boards[0].read())
        assert [file.sha256[0] for file in files] == ["0", "1", "2"]
        assert [file.bytes for file in files] == [save] * 3
        assert shapes == ({"w": [2, save]}, {}, {})
        for board in boards:
            board.clear()
        kept.add(store.num_keys())
    assert len(kept) == 1  # a run of many saves keeps no more


def write_files(folder: Path, sizes: dict[str, int], cuts: dict[str, list[int]]) -> list[str]:
    """A checkpoint's files, one for every range of a parameter; an element's value is its place."""
    names = []
    for name, size in sizes.items():
        for start, stop in zip([0, *cuts[name]], [*cuts[name], size]):
            values = torch.arange(start, stop, dtype=torch.float32)
            names.append(f"rank_{len(names):05d}.safetensors")
            tensors = {f"{state}:{start}:{name}": values.clone() for state in STATES}
            save_file(tensors, folder / names[-1])
    return names


def an_index(files: list[str], shapes: dict[str, tuple[int, ...]]) -> Index:
    state = State(config={}, versions={}, corpus="", held_out={}, tokens=0, next=None)
    described = {name: File(bytes=0, sha256="0" * 64) for name in files}
    return Index(step=1, layout={}, parameters=shapes, files=described, state=state)


def test_each_rank_reads_its_part_of_the_headers_and_is_told_where_its_ranges_are(
    store, tmp_path, monkeypatch
):
    draw, size = random.Random(1), 4
    sizes = {f"layer.{i}": draw.randrange(10, 60) for i in range(6)}
    cuts = {n: sorted(draw.sample(range(1, k), draw.randrange(5))) for n, k in sizes.items()}
    files = write_files(tmp_path, sizes, cuts)
    index = an_index(files, {name: (size,) for name, size in sizes.items()})
    own, ranks = threading.local(), exchanges(store, size)
    monkeypatch.setattr(resume, "gathered_on_rank_0", lambda v: ranks[own.rank].gathered(v))
    monkeypatch.setattr(resume, "dealt", lambda v: ranks[own.rank].dealt(v))
    wanted = [
        [(n, *sorted(draw.sample(range(k + 1), 2))) for n, k in sizes.items()] for _ in range(size)
    ]

    def one(rank: int) -> None:
        own.rank = rank
        part = contents(tmp_path, files[rank::size])
        known = resume.contents_for(part, wanted[rank])
        assert known.keys == set(STATES)
        with Checkpoint(tmp_path, index, known) as held:
            for name, start, stop in wanted[rank]:
                for state in STATES:
                    assert held.read(name, state, start, stop).tolist() == [*range(start, stop)]
        told = {r.file for ranges in known.ranges.values() for r in ranges}
        needed = {
            file
            for name, start, stop in wanted[rank]
            for first, last, file in contents(tmp_path, files).ranges[name]
            if first < stop and last > start
        }
        assert told == needed  # no other file is opened

    assert at_once(size, one) == [None] * size
    with pytest.raises(Damaged, match="do not hold the whole of layer.0"):
        Checkpoint(tmp_path, index.model_copy(update={"files": {f: None for f in files[1:]}}))


def test_an_index_of_10_000_files_is_read_within_a_second(tmp_path):
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    names = [f"rank_{rank:05d}.safetensors" for rank in range(10_000)]
    (folder / FILE).write_text(an_index(names, {"w": (4, 4)}).to_json())
    began = time.process_time()
    assert len(read_index(folder).files) == 10_000
    assert time.process_time() - began < 1.0
