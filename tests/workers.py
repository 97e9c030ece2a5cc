"""Trains many runs in one start of forked processes.

Each is a rank that runs jobs one after the other through `est_ds.training.loop.train`, as
`est-ds train` does inside a launcher.
"""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from est_ds.launch.placement import free_port
from forks import fork, wait

ROOT = Path(__file__).resolve().parents[1]


def train_all(folder: Path, processes: int, jobs: list[dict], timeout_s: float = 600) -> str:
    """As `start`; returns what the ranks said, if every one ended well."""
    codes, logs = start(folder, processes, jobs, timeout_s)
    said = "\n".join(logs)
    assert not any(codes), f"exit codes {codes}\n{said}"
    return said


def start(
    folder: Path, processes: int, jobs: list[dict], timeout_s: float = 600
) -> tuple[list[int], list[str]]:
    """Runs jobs in one group of gloo processes; returns exit codes and logs of the ranks.

    Args:
        folder: where the logs go.
        jobs: each with `run` (a run file or directory) and `overrides`; with `traffic` (a file)
            the bytes that rank 0 communicates in every step are written there, if the overrides
            turn DeepSpeed's communication logger on. With `slow_disk_s` every file of weights
            takes that much longer. With `slow_store_s` all ranks but the first take that long to
            take away what they left at the store. With `late_markers` rank 0 never sees what
            others wrote. With `free_bytes` the disk has no more. With `odd_from` the last rank
            draws another plan from that step on. `poison` has lists [step, what]: in that step the
            last rank's activations become infinite (`loss`) or change places (`jump`), or the first
            rank's gradients become infinite (`gradient`). With `sums_no_ties` DeepSpeed itself
            sums the gradients of tied parameters. With `measures` rounds of step times are
            measured however slow the machine is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = json.loads(json.dumps(jobs, default=str))
    logs = [folder / f"rank{rank}.log" for rank in range(processes)]
    for log in logs:
        log.unlink(missing_ok=True)
    ranks = [
        fork(run_jobs, (jobs,), (log, log), ROOT, environment)
        for log, environment in zip(logs, launched(processes))
    ]
    return wait(ranks, timeout_s), [log.read_text() for log in logs]


def launched(processes: int, **more: str) -> Iterator[dict[str, str]]:
    """The environment of every rank, as a launcher on this machine gives it."""
    port = free_port()
    for rank in range(processes):
        yield {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            **more,
        }


def run_jobs(jobs: list[dict]) -> None:
    """What one rank does."""
    from est_ds.config.run_file import load_run
    from est_ds.engine.build import build_engine
    from est_ds.engine.start import leave_processes, start_processes
    from est_ds.ranks.world import World, say
    from est_ds.run.prepare import prepare
    from est_ds.training.loop import train

    world = World.from_environment()
    meeting = start_processes(world)  # once for all jobs

    def meet_again(world, limit_s, reached):
        reached(meeting.store)
        return meeting

    for job in jobs:
        say(f"=== {job['overrides']}")
        if groups := sys.modules.get("deepspeed.utils.groups"):
            groups.mpu = None  # a pipeline's, which a plain engine after it would take for its own
        traffic: list[dict[str, int]] = []
        build = partial(_counted, build_engine, traffic) if "traffic" in job else build_engine
        if "poison" in job:
            build = partial(_poisoned, build_engine, job["poison"])
        if "sums_no_ties" in job:
            instead("est_ds.engine.ties.Ties.take_over", lambda self, engine: None)
        if "late_markers" in job:  # a shared file system that shows other ranks' files late
            instead("est_ds.checkpoints.writer.Saver.poll", lambda self: None)
        if "slow_disk_s" in job:
            _slow_disk(job)
        if "slow_store_s" in job and not world.is_first:
            _slow_store(job["slow_store_s"])
        if "measures" in job:
            instead("est_ds.training.turns.LEAST_S", 0.0)
            instead("est_ds.training.turns.LARGEST_SHARE", float("inf"))
        if "free_bytes" in job:
            usage = shutil.disk_usage(".")._replace(free=job["free_bytes"])
            instead("shutil.disk_usage", lambda path, usage=usage: usage)
        run = prepare(load_run(job["run"], job["overrides"]), world.size)
        if "odd_from" in job and world.rank == world.size - 1:
            _draw_otherwise(run.method, job["odd_from"])
        train(run, world, join=meet_again, build=build)
        if "traffic" in job and world.is_first:
            Path(job["traffic"]).write_text(json.dumps(traffic))
    leave_processes()


# The seams at which faults are put into a run, besides `join` and `build` of `training.loop.train`.
SEAMS = (
    "est_ds.checkpoints.board.remove",
    "est_ds.checkpoints.writer.Saver.poll",
    "est_ds.checkpoints.writer.save_file",
    "est_ds.engine.ties.Ties.take_over",
    "est_ds.training.loop.train_step",
    "est_ds.training.turns.LARGEST_SHARE",
    "est_ds.training.turns.LEAST_S",
    "shutil.disk_usage",
)


def instead(seam: str, fault: Any) -> Any:
    """Puts a fault in the place of a name of `SEAMS` in this process; returns what was there."""
    assert seam in SEAMS, seam
    owner, _, name = seam.rpartition(".")
    original = pkgutil.resolve_name(seam)
    setattr(pkgutil.resolve_name(owner), name, fault)
    return original


def _draw_otherwise(method, odd_from: int) -> None:
    """As if this rank ran another version of the code."""
    plan = method.plan

    def other(step, micro_batch=0):
        drawn = plan(step, micro_batch)
        return drawn if step < odd_from else replace(plan(step + 1, micro_batch), step=step)

    object.__setattr__(method, "plan", other)


def _slow_disk(job: dict) -> None:
    """Every file of weights takes seconds more; notes when each was written, and each step done."""
    run_dir = job["overrides"][0].removeprefix("run_dir=")
    marks: dict = {"steps": {}, "written": []}

    def slow(*arguments):
        time.sleep(job["slow_disk_s"])
        save_file(*arguments)
        marks["written"].append(time.monotonic())
        Path(run_dir, "marks.json").write_text(json.dumps(marks))

    def noting(job, step):
        marks["steps"].setdefault(str(step), time.monotonic())
        return train_step(job, step)

    save_file = instead("est_ds.checkpoints.writer.save_file", slow)
    train_step = instead("est_ds.training.loop.train_step", noting)


def _slow_store(seconds: float) -> None:
    """To take something away from the store takes longer."""

    def slow(*arguments):
        time.sleep(seconds)
        remove(*arguments)

    remove = instead("est_ds.checkpoints.board.remove", slow)


def _poisoned(build, poison: list, *arguments):
    """An engine whose numbers go wrong in some steps, in one layer of one rank."""
    import torch.distributed as dist

    engine = build(*arguments)
    by_step = dict(poison)
    is_first, is_last = dist.get_rank() == 0, dist.get_rank() == dist.get_world_size() - 1

    def wrong(module, inputs, output):
        what = by_step.get(engine.deepspeed.global_steps)
        if what is None or not output.requires_grad:  # in an evaluation
            return output
        if what == "gradient" and is_first:
            output.register_hook(lambda gradient: gradient * float("inf"))
        if what == "loss" and is_last:
            return output * float("inf")
        return output.flip(-1) if what == "jump" and is_last else output

    engine.layers[min(engine.layers)].register_forward_hook(wrong)
    return engine


def _counted(build, traffic: list[dict[str, int]], *arguments):
    """An engine that notes the bytes of every collective operation of each step, as DeepSpeed's
    communication logger counts them."""
    from deepspeed.comm import comm

    engine = build(*arguments)
    train_batch = engine.train_batch

    def counting(batches):
        comm.comms_logger.comms_dict.clear()
        loss = train_batch(batches)
        sizes = comm.comms_logger.comms_dict.items()
        traffic.append({op: sum(size * n[0] for size, n in by.items()) for op, by in sizes})
        return loss

    engine.train_batch = counting
    return engine
