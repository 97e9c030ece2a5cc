"""Finds the largest micro-batch that fits (`batch.micro: auto`), before a run begins.

On a machine without GPUs the estimate of `est-ds plan` says what fits into its memory. On GPUs it
is tried: in the run's own layout its processes train the full model for a few steps, with the
largest micro-batch first that the estimate lets fit.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from est_ds.config.run_config import RunConfig
from est_ds.config.run_file import load_run
from est_ds.cost.memory import memory_of_run
from est_ds.cost.micro_batches import micro_batches
from est_ds.design import make_outline
from est_ds.engine.build import build_engine
from est_ds.engine.start import leave_processes, start_processes
from est_ds.errors import Failure, UserError, gigabytes
from est_ds.launch.launcher import Watched, start
from est_ds.launch.placement import Launch
from est_ds.launch.signals import Signals
from est_ds.ranks.watchdog import Watchdog
from est_ds.ranks.world import World, end_with_starter
from est_ds.report.plan_memory import subject_of
from est_ds.run.prepare import prepare
from est_ds.training.turns import Measured

MODULE = "est_ds.training.micro_batch"
TOO_LARGE = "est-ds: the micro-batch does not fit"
GAVE_UP_S = 1800.0  # without a turn
SHARE = 0.8  # of a machine's free memory that a run may take
# Of a GPU's, for torch's allocator. More than `est-ds plan` counts on: a trial has the allocator's
# slack in it, and the estimate only says with which size to begin.
GPU_SHARE = 0.94
LIBRARIES_BYTES = 0.75e9  # of a process on a CPU, beside what is estimated
CGROUPS = ("memory.max", "memory/memory.limit_in_bytes")  # of versions 2 and 1


def find_micro(run: str, overrides: Sequence[str], where: Launch) -> int:
    """Returns the largest micro-batch that divides a replica's share of the batch, and fits.

    Args:
        run: a run file; with the overrides its `batch.micro` is `auto`.

    Raises:
        UserError: nothing fits; or there are several nodes, on which it is not tried.
        Failure: a trial failed for another reason.
        SystemExit: a signal came during the trials; its code is that of `est-ds train`.
    """
    if where.by_ssh or where.node_rank is not None:
        raise UserError(
            "batch.micro=auto works on one machine; give a number on several (such as the one that "
            "est-ds train finds for one of them)."
        )
    config = load_run(run, list(overrides))
    sizes, needs = micro_batches(config, where.processes), expected_bytes(config, where.processes)
    if torch.cuda.is_available():
        room = GPU_SHARE * min(map(_gpu_bytes, range(torch.cuda.device_count())))
        likely = [m for m in sizes if needs(m) <= room] or sizes[-1:]
        if found := first_that_fits(likely, [run, *overrides], where):
            return found
        least = f"a micro-batch of {sizes[-1]} does not fit into a GPU of {gigabytes(room)}"
    else:
        room = SHARE * memory_bytes() / where.processes
        for micro in sizes:
            if needs(micro) <= room:
                print(
                    f"batch.micro=auto: {micro}, estimated at {gigabytes(needs(micro))} of "
                    f"{gigabytes(room)} for a process",
                    flush=True,
                )
                return micro
        needed = gigabytes(needs(sizes[-1]))
        least = f"{sizes[-1]} needs {needed} in a process, and there are {gigabytes(room)}"
    raise UserError(
        f"batch.micro=auto: {least}; start more processes with a higher parallel.zero, set "
        f"activation_checkpointing=true, or train a smaller model."
    )


def expected_bytes(config: RunConfig, processes: int) -> Callable[[int], float]:
    """Returns what maps a micro-batch to the bytes that a process of the fullest pipe stage needs:
    its tensors, and on CPUs what DeepSpeed keeps in the host's memory, and the libraries.

    Raises:
        UserError: the run's parts do not fit together.
    """
    on_gpu, replicas = torch.cuda.is_available(), config.data_parallel(processes)
    outline = make_outline(config.with_micro(1))

    def needed(micro: int) -> float:
        sized = replace(outline, config=config.with_micro(micro))
        memory = memory_of_run(subject_of(sized, on_gpu), replicas)
        return memory.total_bytes + (0.0 if on_gpu else memory.host_bytes + LIBRARIES_BYTES)

    return needed


def memory_bytes() -> int:
    """Free memory of this machine, or what its container may have, if that is less."""
    found = [psutil.virtual_memory().available]
    for name in CGROUPS:
        file = Path("/sys/fs/cgroup", name)
        if file.is_file() and (text := file.read_text().strip()).isdecimal():
            found.append(int(text))
    return min(found)


def _gpu_bytes(number: int) -> int:
    return torch.cuda.get_device_properties(number).total_memory


def first_that_fits(sizes: Sequence[int], arguments: list[str], where: Launch) -> int | None:
    """Returns the first of the micro-batches with which a trial succeeds, None without one.

    A signal ends the trial at once: it has nothing to save.

    Args:
        arguments: the run file and its overrides.

    Raises:
        Failure, UserError: see `_fits`.
        SystemExit: a signal came.
    """
    with Signals() as signals:
        trials = (m for m in sizes if _fits([*arguments, f"batch.micro={m}"], where, signals))
        found = next(trials, None)
    if signals.code is not None:
        print("est-ds: ended by a signal before training began", file=sys.stderr, flush=True)
        raise SystemExit(signals.code)
    return found


def _fits(arguments: list[str], where: Launch, signals: Signals) -> bool:
    """Tries a micro-batch in processes of their own.

    Returns:
        Whether it fits; True as well if a signal came, after which there is nothing to try.

    Raises:
        Failure: they failed for another reason than a lack of memory.
        UserError: the run does not fit itself, or the machine.
    """
    micro = arguments[-1]
    print(f"batch.micro=auto: trying {micro}", flush=True)
    with TemporaryDirectory(prefix="est-ds-micro-") as folder:
        log = Path(folder, "log")
        with log.open("w") as f:
            trial = replace(where, module=MODULE).again(where.slots)
            code = start(arguments, trial, 60.0, signals, Watched(f, lambda: signals.noticed))
        said = log.read_text(errors="replace")
    if code == 0 or signals.code is not None:
        return True
    if TOO_LARGE in said:
        return False
    lines = said.strip().splitlines() or ["they said nothing"]
    if code == 2:
        raise UserError(lines[-1].removeprefix("est-ds: "))
    end = " / ".join(line.strip() for line in lines[-8:])
    raise Failure(f"batch.micro=auto: the trial of {micro} failed: {end}")


def main(arguments: list[str]) -> None:
    """What one process of a trial does."""
    world = World.from_environment()
    end_with_starter()
    run, *overrides = [word for word in arguments if not word.startswith("--")]
    try:
        meeting = start_processes(world, GAVE_UP_S)
        config = load_run(run, overrides)
        with Watchdog(meeting, world, GAVE_UP_S) as watchdog:
            try:
                _train_some(config, world, watchdog)
            except Exception as e:
                if _is_lack_of_memory(e):
                    print(TOO_LARGE, file=sys.stderr, flush=True)
                    os._exit(1)  # the others may be waiting for this one
                raise
    except (UserError, Failure) as e:
        print(f"est-ds: {e}", file=sys.stderr, flush=True)
        leave_processes(2 if isinstance(e, UserError) else 1)
    leave_processes()


def _train_some(config: RunConfig, world: World, watchdog: Watchdog) -> None:
    """Trains the full model for two steps, each of as many micro-batches as are held at once."""
    batch, pipe = config.batch, config.parallel.pipe
    replicas = config.data_parallel(world.size)
    at_once = min(batch.accumulation(replicas), max(2, 2 * pipe))
    less = batch.model_copy(update={"global_": batch.micro * replicas * at_once})
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(GPU_SHARE)
    run = prepare(config.model_copy(update={"batch": less}), world.size)
    watchdog.mark(0, "building the engine")
    turn = Measured.of("", run, build_engine(run, world)).full()
    for round in range(2):  # the optimizer's state is there in the second
        watchdog.mark(round, "trying a micro-batch")
        turn.take(round)


def _is_lack_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    words = ("out of memory", "alloc_failed", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in text for word in words)


if __name__ == "__main__":
    main(sys.argv[1:])
