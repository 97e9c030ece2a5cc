"""Trains the runs of a study by the ordinary command, some beside each other.

Nothing of the queue is state: what is finished stands in `results.jsonl`, and what is half trained
in the run directories. A study that is killed at any instant goes on from there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from est_ds.checkpoints.store import Store
from est_ds.config.run_file import load_run
from est_ds.disk import hold
from est_ds.errors import Failure, UserError
from est_ds.launch.placement import default_processes
from est_ds.launch.signals import Signals
from est_ds.ranks import preempt
from est_ds.ranks.world import STARTER
from est_ds.run.directory import LOCK, write_config
from est_ds.run.metrics import steps_logged
from est_ds.studies.runs import StudyRun, key_of

LOG = "train.log"
DIVERGED = 3
POLL_S = 0.2
# For what a killed study has left running to notice that, and to end.
LEFT_OVER_S = 30.0

# Of one run or its files: the others go on.
FAULTS = (UserError, Failure, OSError)
# Exit codes of a run that was asked to end by others than the study.
ENDED = (preempt.EXIT_CODE, 130, -signal.SIGINT, 128 + signal.SIGHUP)


@dataclass(frozen=True)
class Places:
    """Where runs train beside each other on this machine.

    Attributes:
        processes: of one run.
        environments: what each place adds to the environment of its run.
    """

    processes: int
    environments: tuple[dict[str, str], ...]

    @classmethod
    def on_this_machine(cls, processes: int, jobs: int | None) -> Places:
        """As many as fit, or as many as asked for.

        Args:
            processes: of one run.

        Raises:
            UserError: there are too few GPUs.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cores = cores or 1
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            count = torch.cuda.device_count()
            gpus = visible.split(",") if visible else [str(i) for i in range(count)]
            return cls(processes, on_gpus(gpus, cores, processes, jobs))
        most = max(1, cores // processes)
        if jobs and jobs > max(most, cores):
            raise UserError(
                f"--jobs={jobs}: this machine has {cores} cores; use at most that many."
            )
        jobs = jobs or most
        threads = max(1, cores // (jobs * processes))
        return cls(processes, ({"OMP_NUM_THREADS": str(threads)},) * jobs)


def on_gpus(
    gpus: list[str], cores: int, processes: int, jobs: int | None
) -> tuple[dict[str, str], ...]:
    """GPUs for runs beside each other: each has its own, unless more runs of one process each are
    asked for than there are GPUs. Those share them, which fills a GPU where the model is small.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them.
        cores: of this machine.
        processes: of one run.
        jobs: asked for; None for as many as there are GPUs for.

    Raises:
        UserError: a run needs more GPUs than are there; more runs than GPUs or cores.
    """
    most = cores if processes == 1 else len(gpus) // processes
    jobs = jobs or max(1, len(gpus) // processes)
    if jobs > max(most, len(gpus) // processes):
        had = f"{len(gpus)} GPUs and {cores} cores"
        raise UserError(
            f"--jobs={jobs} with {processes} processes a run: this machine has {had}; use at most "
            f"--jobs={most}."
            if most
            else f"a run of {processes} processes needs as many GPUs, and this machine has {had}; "
            f"set parallel.processes to at most {len(gpus)}."
        )
    threads = {"OMP_NUM_THREADS": str(max(1, cores // (jobs * processes)))}
    if jobs * processes > len(gpus):
        return tuple({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} | threads for i in range(jobs))
    groups = [gpus[i * processes : (i + 1) * processes] for i in range(jobs)]
    return tuple({"CUDA_VISIBLE_DEVICES": ",".join(group)} | threads for group in groups)


def processes_of(run: StudyRun) -> int:
    """Processes that a run of a study starts: what its run file says; on GPUs a pipeline's."""
    if torch.cuda.is_available():
        return run.config.parallel.processes or run.config.parallel.pipe
    return default_processes(run.config)


@dataclass
class Running:
    """A run that trains.

    Attributes:
        place: of `Places.environments`.
    """

    run: StudyRun
    process: subprocess.Popen
    place: int
    log: TextIO

    @property
    def left(self) -> float:
        """The share of its steps that it has still to train."""
        done = steps_logged(Path(self.run.config.run_dir))
        return max(0, self.run.steps - done) / self.run.steps


@dataclass(frozen=True)
class Watcher:
    """What the queue asks and tells while it trains.

    Attributes:
        todo: the runs that can start now, the next one first; asked again after every end.
        done: takes a run that is trained (False: it diverged). An error of the user, a failure or
            one of the disk is then one of this run.
        failed: takes a run that failed, and why.
        beat: called several times a second with the runs under way.
    """

    todo: Callable[[], list[StudyRun]]
    done: Callable[[StudyRun, bool], None]
    failed: Callable[[StudyRun, str], None]
    beat: Callable[[list[Running]], None]


def train_all(places: Places, watcher: Watcher, signals: Signals) -> int:
    """Trains until nothing is left to do, or a signal has come.

    Returns:
        0, or the exit code that a signal asks for: the runs under way have then been saved, or
        (SIGINT, SIGHUP) ended.
    """
    running: list[Running] = []
    signals.end = lambda: _signal(running, signal.SIGINT)
    notified, changed = False, True
    try:
        while True:
            left = [r for r in running if not _ended(r, watcher, signals.code is not None)]
            changed = changed or len(left) < len(running)
            running[:] = left
            if signals.code is None and changed:
                changed = _fill(places, running, watcher)
            if signals.code is not None and not notified:
                notified = True
                _signal(running, signal.SIGTERM)
            if not running and (signals.code is not None or not changed):
                return signals.code or 0
            watcher.beat(running)
            time.sleep(POLL_S)
    finally:
        signals.end = lambda: None
        _signal(running, signal.SIGKILL)


def _fill(places: Places, running: list[Running], watcher: Watcher) -> bool:
    """Starts runs on the free places; returns whether others may now be able to start."""
    taken = {r.place for r in running}
    free = [place for place in range(len(places.environments)) if place not in taken]
    if not free:
        return False
    under_way, ended = {r.run.key for r in running}, False
    for run in watcher.todo():
        if not free:
            break
        if run.key in under_way:
            continue
        under_way.add(run.key)
        try:
            if finished(run):
                watcher.done(run, True)
                ended = True
            else:
                running.append(_start(run, free[0], places))
                free.pop(0)
        except FAULTS as e:
            watcher.failed(run, str(e))
            ended = True
    return ended


def finished(run: StudyRun) -> bool:
    """Whether a run directory holds the run, trained to its end."""
    directory = Path(run.config.run_dir)
    return (
        (directory / "config.yaml").exists()
        and Store.of(directory).latest == run.steps
        and key_of(load_run(directory)) == run.key
    )


def _start(run: StudyRun, place: int, places: Places) -> Running:
    """Starts or resumes a run.

    Raises:
        UserError: its directory holds another run.
        OSError: it cannot be written.
    """
    directory = Path(run.config.run_dir)
    if not (directory / "config.yaml").exists():
        write_config(run.config)
    elif key_of(load_run(directory)) != run.key:
        raise UserError(
            f"{directory} holds a run of another config: the arm has changed since. Move it away, "
            f"or choose another study_dir."
        )
    _wait_for(directory / LOCK)
    command = [sys.executable, "-m", "est_ds.cli", "train", str(directory)]
    command += ["--processes", str(places.processes)]
    log = (directory / LOG).open("a")
    process = subprocess.Popen(
        command,
        env={**os.environ, STARTER: str(os.getpid()), **places.environments[place]},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return Running(run, process, place, log)


def _wait_for(lock: Path) -> None:
    """Waits until nobody holds a run directory; the command says who does if that lasts."""
    end = time.monotonic() + LEFT_OVER_S
    while time.monotonic() < end:
        try:
            hold(lock).close()
            return
        except BlockingIOError:
            time.sleep(POLL_S)


def _ended(running: Running, watcher: Watcher, signalled: bool) -> bool:
    """Whether a run has ended; hands on what came of it.

    Args:
        signalled: whether the study ends by a signal: a run that has not heeded it yet, because it
            was starting, has not failed.
    """
    code = running.process.poll()
    if code is None:
        return False
    running.log.close()
    if code in (0, DIVERGED):
        try:
            watcher.done(running.run, code == 0)
        except FAULTS as e:
            watcher.failed(running.run, str(e))
    elif not signalled and code not in ENDED:
        watcher.failed(running.run, f"exit code {code}; {_last_line(running.run)}")
    return True


def _last_line(run: StudyRun) -> str:
    """What a run said last, and where."""
    log = Path(run.config.run_dir) / LOG
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("est-ds: ")] or lines
    return f"{said[-1]} ({log})" if said else f"it said nothing ({log})"


def _signal(running: list[Running], number: int) -> None:
    for r in running:
        if r.process.poll() is None:
            r.process.send_signal(number)
