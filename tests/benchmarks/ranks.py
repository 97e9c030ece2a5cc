"""What start, save and resume cost rank 0, and each rank, with thousands of ranks on one machine.

    python tests/benchmarks/ranks.py [--ranks 64 512 4096] [--extrapolate 10240]

Ranks are threads in a few processes, rank 0 one of its own. Torch's store is the real one, and so
are the protocol and a checkpoint's files, one of every rank. What the process group does, which is
to reduce a number and to broadcast a few kB, is not measured: the threads meet at a barrier.

Requests and bytes (keys and values) are counted where they leave a rank. Where the machine allows a
network namespace the ranks run in one, in which looking up names costs nothing.

Targets: 4,096 ranks meet within 20 s, a save of theirs is coordinated within 1 s, bytes through
rank 0 are linear in the ranks, and plan and data order cost a rank the same among any number.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import run_script, timed, verdict
from loader import write_corpus
from safetensors.torch import save_file

from est_ds.checkpoints import resume
from est_ds.checkpoints.board import Board
from est_ds.checkpoints.index import FILE, Index
from est_ds.checkpoints.reader import check_cover, contents
from est_ds.checkpoints.state import State
from est_ds.checkpoints.store import Store
from est_ds.config.arguments import positive
from est_ds.config.run_file import load_run
from est_ds.data.loader import Batches, Ordering, Portion, Sampling
from est_ds.disk import describe
from est_ds.errors import Failure, UserError
from est_ds.launch.placement import free_port
from est_ds.plans.methods import build_method
from est_ds.ranks import meeting
from est_ds.ranks.gather import Exchange
from est_ds.ranks.world import World
from est_ds.slicing.families import family_of, hf_config

HOST_RANKS, LIMIT_S, INSIDE = 8, 300.0, "EST_DS_BENCHMARK_INSIDE"
PARAMETERS = {f"model.layers.{i // 9}.part_{i % 9}.weight": (64, 512) for i in range(198)}
OWN_SAMPLES, REPLICAS = 4, (8, 512, 4096)
ROOT = Path(__file__).resolve().parents[2]
MOST_MEETING_S, MOST_SAVE_S = 20.0, 1.0
STAGES = ("meet", "save", "resume")
own = threading.local()


class Counted:
    """A rank's connection to the store, with what it asks for; of all ranks of a process."""

    requests = num_bytes = 0
    lock = threading.Lock()

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return self._counting(found) if callable(found) else found

    @staticmethod
    def _counting(ask: Callable) -> Callable:
        def asked(*arguments: Any) -> Any:
            answer = ask(*arguments)
            num_bytes = _size(arguments) + _size(answer)
            with Counted.lock:
                Counted.requests += 1
                Counted.num_bytes += num_bytes
            return answer

        return asked


def _size(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    return len(value) if isinstance(value, (str, bytes)) else 1


class Barrier:
    """Where all threads of all processes meet."""

    def __init__(self, num_processes: int) -> None:
        self._between = multiprocessing.get_context("fork").Barrier(num_processes)

    def within(self, num_threads: int) -> None:
        """In each process, before its threads start."""
        self._in = threading.Barrier(num_threads, self._between.wait)

    def wait(self) -> None:
        self._in.wait(LIMIT_S)


def simulate(num_ranks: int, folder: Path, num_processes: int = 8) -> dict[str, dict[str, float]]:
    """Of every stage the seconds until the last rank was through, and the requests and bytes; of
    rank 0's process the MiB that it grew by."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    parts = [[0], *(list(range(i, num_ranks, num_processes)) for i in range(1, num_processes + 1))]
    parts = [part for part in parts if part]
    context, barrier = multiprocessing.get_context("fork"), Barrier(len(parts))
    results = context.SimpleQueue()
    started = [
        context.Process(target=_process, args=(part, num_ranks, folder, barrier, results))
        for part in parts
    ]
    for process in started:
        process.start()
    found = [results.get() for _ in started]
    for process in started:
        process.join()
    whole = {}
    for stage in STAGES:
        of_stage = [one[stage] for one in found]
        whole[stage] = {key: sum(one[key] for one in of_stage) for key in ("requests", "bytes")}
        whole[stage]["s"] = max(one["s"] for one in of_stage)
        whole[stage]["mib"] = max(one["mib"] for one in of_stage)
        whole[stage]["all_cpu_s"] = sum(one["cpu_s"] for one in of_stage)
        whole[stage]["cpu_s"] = max(one["cpu_s"] for one in of_stage if one["is_first"])
    return whole


def _process(ranks: list[int], num_ranks: int, folder: Path, barrier: Barrier, results) -> None:
    found: dict[str, dict[str, float]] = {stage: {"s": 0.0} for stage in STAGES}
    barrier.within(len(ranks))
    _simulated_parts()
    threads = [
        threading.Thread(target=_rank, args=(rank, num_ranks, folder, barrier, found, ranks[0]))
        for rank in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put(found)


def _simulated_parts() -> None:
    """Puts in what a process alone would have of its own, and the barrier for the group."""
    versions = meeting.comparable_versions()  # reading them is each process's own work
    meeting.comparable_versions = lambda: versions
    meeting.host_name = lambda: f"node{own.rank // HOST_RANKS:04d}"
    serve, connect = meeting._serve, meeting.connect
    meeting._serve = lambda *place: Counted(serve(*place))
    meeting.connect = lambda *place: Counted(connect(*place))
    resume.gathered_on_rank_0 = lambda value: own.exchange.gathered(value)
    resume.dealt = lambda values: own.exchange.dealt(values)
    resume.of_rank_0 = lambda value: own.broadcast(value)
    resume.first_of_all = lambda value: None if value is None else (own.rank, value)
    resume.dist = SimpleNamespace(get_rank=lambda: own.rank, get_world_size=lambda: own.num_ranks)


def _rank(
    rank: int, num_ranks: int, folder: Path, barrier: Barrier, found: dict, first: int
) -> None:
    own.rank, own.num_ranks = rank, num_ranks
    before: dict[str, float] = {}

    def measured(stage: str, work: Callable[[], Any]) -> Any:
        barrier.wait()
        if rank == first:
            before.update(_usage())
        barrier.wait()
        began = time.perf_counter()
        result = work()
        took_s = time.perf_counter() - began
        with Counted.lock:
            found[stage]["s"] = max(found[stage]["s"], took_s)
        barrier.wait()
        if rank == first:
            used = {key: value - before[key] for key, value in _usage(peak=True).items()}
            found[stage] |= used | {"is_first": rank == 0, "mib": used["mib"] * (rank == 0)}
        return result

    met = measured("meet", lambda: meeting.meet(World(rank, num_ranks, 0), LIMIT_S))
    own.exchange = Exchange(met.store, rank, num_ranks, barrier.wait)
    step, store = 1, Store(folder)
    partial = store.folder / ".step_00000001.partial"
    file = partial / f"rank_{rank:05d}.safetensors"
    save_file(_tensors(rank, num_ranks), file)
    written, board = describe(file), Board(rank, num_ranks, met.store)

    def save() -> None:
        board.begin()
        board.leave(written, PARAMETERS if rank == 0 else {})
        if rank == 0:
            _complete(board, partial, store.path(step))

    measured("save", save)

    # The process group broadcasts it; here each process has it from rank 0's file.
    def broadcast(value: Any) -> Any:
        if rank == 0:
            (folder / "broadcast").write_text(value[0].model_dump_json())
        barrier.wait()
        return Index.model_validate_json((folder / "broadcast").read_text()), None

    own.broadcast = broadcast

    def resumed() -> None:
        index, wrong = resume._inspect(store, step)
        assert wrong is None, wrong
        wanted = [(name, start, stop) for name, start, stop in _ranges(rank, num_ranks)]
        told = resume.contents_for(contents(store.path(step), index.files), wanted)
        for name, start, stop in wanted:
            check_cover(name, told.ranges[name], start, stop)

    measured("resume", resumed)
    barrier.wait()


def _complete(board: Board, partial: Path, final: Path) -> None:
    """What rank 0 does once all have written, but for the disk's time."""
    while not board.is_full():
        time.sleep(0.01)
    files, parameters = {}, {}
    for rank, (file, shapes) in enumerate(board.read()):
        files[f"rank_{rank:05d}.safetensors"] = file
        parameters |= shapes
    state = State(config={}, versions={}, corpus="", held_out={}, tokens=0, next=None)
    index = Index(step=1, layout={}, parameters=parameters, files=files, state=state)
    (partial / FILE).write_text(index.to_json())
    os.replace(partial, final)


def _ranges(rank: int, num_ranks: int) -> list[tuple[str, int, int]]:
    """The part of the flattened parameters that ZeRO 1 gives a rank."""
    sizes = [rows * columns for rows, columns in PARAMETERS.values()]
    first, last = (sum(sizes) * (rank + i) // num_ranks for i in (0, 1))
    found, at = [], 0
    for name, size in zip(PARAMETERS, sizes):
        start, stop = max(first - at, 0), min(last - at, size)
        if start < stop:
            found.append((name, start, stop))
        at += size
    return found


def _tensors(rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
    return {
        f"{state}:{start}:{name}": torch.zeros(stop - start)
        for name, start, stop in _ranges(rank, num_ranks)
        for state in ("weight", "exp_avg", "exp_avg_sq")
    }


def _usage(peak: bool = False) -> dict[str, float]:
    """What this process has asked for and used up to now, and MiB that it takes, or took at most
    since the last call."""
    text = Path("/proc/self/status").read_text()
    kib = text.partition("VmHWM:" if peak else "VmRSS:")[2].split()[0]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    counts = {"requests": Counted.requests, "bytes": Counted.num_bytes}
    return {**counts, "cpu_s": time.process_time(), "mib": int(kib) / 1024}


def plans_and_order(steps: int) -> None:
    """Prints what a step's plan, and a replica's samples of a step, take among any number."""
    config = load_run(ROOT / "configs" / "run" / "est_tinyllama.yaml")
    shape = family_of(config.model["model_type"]).shape(hf_config(config.model))
    method = build_method(config.method, seed=0, steps=config.steps, shape=shape)
    plan_ms = 1e3 * min(timed(lambda: method.plan(step).digest) for step in range(1, steps + 1))
    print(f"a plan of TinyLlama-1.1B, with its digest: {plan_ms:.2f} ms, whatever the ranks")
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder, "corpus"), 2 * OWN_SAMPLES * max(REPLICAS) * 128, seed=1)
        for replicas in REPLICAS:
            order = Ordering(global_batch=OWN_SAMPLES * replicas, seed=0)
            batches = Batches([corpus], Sampling(sequence=128), order)
            portion = Portion(replicas // 2, replicas, OWN_SAMPLES)

            def read(step: int, batches: Batches = batches, portion: Portion = portion) -> float:
                return timed(lambda: [None for _ in batches.micro_batches(step, portion)])

            own_ms = 1e3 * min(map(read, range(steps)))
            digest_ms = 1e3 * min(timed(lambda: batches.digest(step)) for step in range(steps))
            print(
                f"{replicas} replicas of {OWN_SAMPLES} samples: a step's own {own_ms:.2f} ms, "
                f"digest of the global batch {digest_ms:.2f} ms"
            )


def extrapolated(number: int, found: dict[int, dict]) -> dict[str, dict[str, float]]:
    """Every figure of a larger number of ranks, by the line through the two largest."""
    low, high = sorted(found)[-2:]
    return {
        stage: {
            key: then + (then - found[low][stage][key]) * (number - high) / (high - low)
            for key, then in found[high][stage].items()
        }
        for stage in STAGES
    }


def show(ranks: str, found: dict[str, dict[str, float]], number: int) -> None:
    for stage, of in found.items():
        each = f"{of['requests'] / number:.1f} requests and {of['bytes'] / number:.0f} B a rank"
        print(
            f"{ranks:>7} ranks {stage:7} {of['s']:6.2f} s, processor of rank 0 {of['cpu_s']:.2f} s "
            f"and of all {of['all_cpu_s']:.2f} s, {of['requests']:.0f} requests, "
            f"{of['bytes'] / 1e6:.2f} MB ({each}), rank 0 grew by {of['mib']:.1f} MiB",
            flush=True,
        )


def run_apart() -> None:
    """Runs the script in a process of its own, in a network namespace where that is allowed."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    own_network = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if shutil.which("unshare"):
        if not subprocess.run([*own_network, "true"], capture_output=True).returncode:
            command = own_network + command
    environment = {**os.environ, INSIDE: "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=positive, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--extrapolate", type=int, default=10_240)
    parser.add_argument("--steps", type=positive, default=5)
    options = parser.parse_args()
    most = max(options.ranks)
    try:  # here, and not when rank 0 of them finds it and the others wait
        meeting._allow_sockets(meeting.SOCKETS * most)
    except Failure as e:
        raise UserError(f"--ranks {most}: {e}") from None
    if INSIDE not in os.environ:
        return run_apart()
    threading.stack_size(512 * 1024)
    found = {}
    for number in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / ".step_00000001.partial").mkdir()
            found[number] = simulate(number, Path(folder))
        show(f"{number:,}", found[number], number)
    if len(found) > 1:
        beyond = options.extrapolate
        show(f"~{beyond:,}", extrapolated(beyond, found), beyond)
        low, high = sorted(found)[-2:]
        for stage in STAGES:
            per_rank = [found[n][stage]["bytes"] / n for n in (low, high)]
            ratio = per_rank[1] / per_rank[0]
            print(f"{stage}: bytes a rank, {high:,} over {low:,}: {ratio:.2f}  {verdict(ratio, 2)}")
    for stage, most in (("meet", MOST_MEETING_S), ("save", MOST_SAVE_S)):
        took_s, cpu_s = (found[max(found)][stage][key] for key in ("s", "cpu_s"))
        print(
            f"{stage} of {max(found):,}: {took_s:.2f} s  {verdict(took_s, most)}, rank 0's own "
            f"{cpu_s:.2f} s  {verdict(cpu_s, most)}"
        )
    plans_and_order(options.steps)


if __name__ == "__main__":
    run_script(main)
