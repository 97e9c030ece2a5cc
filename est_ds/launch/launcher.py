"""Runs the `deepspeed` launcher to its end: signals, the environment, and hosts that hang.

The launcher is started in a session of its own, and never sees the signals that this process gets:
it would pass no notice on, and give the processes 30 s at most.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

import torch

from est_ds.launch import hosts, ssh
from est_ds.launch.orphans import Keeper
from est_ds.launch.placement import Launch
from est_ds.launch.signals import Signals
from est_ds.ranks import preempt
from est_ds.ranks.world import STARTER

# Of pdsh, when the command on a host has failed.
HOST_FAILED = re.compile(r"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")
# DeepSpeed's log of every host's processes: over ssh it cannot be told to be quiet.
CHATTER = re.compile(r"(\S+: )?\[[-\d :,]+\] \[(INFO|ERROR)\] \[launch\.py:")
OBEYED = {preempt.EXIT_CODE, 255}  # 255 is ssh's own; of the processes it is none
POLL_S = 0.005
# Of the processes, when all end alike: done, wrong input, diverged, pre-empted. The rest is 1.
PASSED_ON = (0, 2, 3, preempt.EXIT_CODE)


def launch(
    arguments: list[str],
    where: Launch,
    limit_s: float,
    log: TextIO | None = None,
    kill_when: Callable[[], bool] | None = None,
) -> int:
    """Starts est-ds under the launcher, and waits.

    A notice of pre-emption (SIGTERM, SIGUSR1) goes to the training processes, which save and exit.
    SIGINT, SIGHUP and the death of this process end them at once.

    Args:
        arguments: the command line of est-ds.
        limit_s: how long hosts may go on when one of them has failed.
        log: takes what they print; None: this process's own output does.
        kill_when: asked every few milliseconds; once it is true, all are killed (SIGKILL), as
            they are when a machine is lost.

    Returns:
        Exit code: 0, 1, 2, 3 or `preempt.EXIT_CODE` as the processes', 128 + n after signal n.
    """
    with Signals() as signals:
        return start(arguments, where, limit_s, signals, Watched(log, kill_when))


@dataclass(frozen=True)
class Watched:
    """How somebody looks on: see `launch`."""

    log: TextIO | None = None
    kill_when: Callable[[], bool] | None = None


def start(
    arguments: list[str],
    where: Launch,
    limit_s: float,
    signals: Signals,
    watched: Watched = Watched(),
) -> int:
    """As `launch`, for who goes on to heed signals afterwards."""
    log = watched.log
    keeper = Keeper(where.name, where.slots) if where.by_ssh else nullcontext()
    with TemporaryDirectory(prefix="est-ds-") as folder, keeper:
        environment = _environment(where, Path(folder))
        command = where.command(arguments, Path(folder))
        sys.stdout.flush()
        launcher = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE if where.by_ssh else log,
            stderr=subprocess.PIPE if where.by_ssh else log,
            text=True,
            # Inherited by all: a notice that comes before a process heeds it does not kill it.
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
        )
        if where.by_ssh:
            keeper.end_too(launcher.pid)
        running = _Running(where, launcher, limit_s, signals)
        code = running.wait(watched.kill_when)
    if running.was_killed:
        return 128 + signal.SIGKILL
    if signals.ended_by is not None:
        return 128 + signals.ended_by
    if running.obeyed:
        return preempt.EXIT_CODE
    return code if code in PASSED_ON else 1


class _Running:
    """Passes signals on to a launcher, and sees to it that nothing outlives it."""

    def __init__(
        self, where: Launch, launcher: subprocess.Popen, limit_s: float, signals: Signals
    ) -> None:
        self._where, self._launcher, self._limit_s = where, launcher, limit_s
        self._signals = signals
        self._listeners: list[threading.Thread] = []
        self._failed = threading.Event()
        self._codes: dict[str, int] = {}  # of hosts that have failed, as pdsh says
        self.was_killed = False
        signals.end = self._end
        if signals.ended_by is not None:  # it came before
            self._end()
        threading.Thread(target=self._notify, daemon=True).start()
        if where.by_ssh:
            self._listeners = [
                threading.Thread(target=self._listen, args=streams, daemon=True)
                for streams in ((launcher.stdout, sys.stdout), (launcher.stderr, sys.stderr))
            ]
            for listener in self._listeners:
                listener.start()
            threading.Thread(target=self._end_after_failure, daemon=True).start()

    def wait(self, kill_when: Callable[[], bool] | None) -> int:
        while kill_when and self._signals.ended_by is None and self._launcher.poll() is None:
            if kill_when():
                self.was_killed = True
                _signal_group(self._launcher, signal.SIGKILL)
                break
            time.sleep(POLL_S)
        code = self._launcher.wait()
        self._signals.end = lambda: None
        _signal_group(self._launcher, signal.SIGKILL)  # whatever outlived the launcher
        for listener in self._listeners:
            listener.join(5.0)
        are_gone = self.obeyed and self._codes.keys() == self._where.slots.keys()
        if self._where.by_ssh and code != 0 and not are_gone:
            ssh.kill(self._where.slots, self._where.name)
        return code

    @property
    def obeyed(self) -> bool:
        """Whether a notice ended the processes of the hosts, as far as they could be reached.

        pdsh gives the largest code of all, which is ssh's where a host cannot be.
        """
        codes = set(self._codes.values())
        return self._signals.noticed and bool(codes) and codes <= OBEYED

    def _end(self) -> None:
        _signal_group(self._launcher, signal.SIGTERM)

    def _notify(self) -> None:
        """Sends a notice until all have gone: one that is starting does not heed it yet."""
        while self._launcher.poll() is None:
            if not self._signals.noticed:
                time.sleep(0.1)
                continue
            if self._where.by_ssh:
                # Not those that have ended, or never answered, for whom pdsh would wait.
                left = [host for host in self._where.slots if host not in self._codes]
                if left:
                    ssh.notify(left, self._where.name)
            else:
                _signal_group(self._launcher, signal.SIGUSR1)
            time.sleep(1.0)

    def _listen(self, source: TextIO, to: TextIO) -> None:
        """Passes on what the hosts say, and hears when one of them has failed."""
        for line in source:
            if found := HOST_FAILED.search(line):
                self._codes[found[1]] = int(found[2])
                self._failed.set()
            elif not CHATTER.match(line):
                to.write(line)
                to.flush()

    def _end_after_failure(self) -> None:
        """pdsh waits for the other hosts, however long they hang."""
        self._failed.wait()
        try:
            self._launcher.wait(min(60.0, self._limit_s))
        except subprocess.TimeoutExpired:
            print("est-ds: ending the hosts that still run", file=sys.stderr, flush=True)
            _signal_group(self._launcher, signal.SIGKILL)


def _environment(where: Launch, folder: Path) -> dict[str, str]:
    # Under mpirun DeepSpeed compares its ranks with MPI's, which are the nodes' here.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMPI_COMM_WORLD_")}
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        largest = max(where.slots.values())
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // largest)))
    if not where.by_ssh:
        return environment | {STARTER: str(os.getpid())}
    # DeepSpeed reads it by its name in the home folder and in the working directory.
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    file = folder / "deepspeed_env"
    hosts.write_environment(file, environment, [Path.home() / name, Path(name)])
    return ssh.with_ssh_options(environment | {"DS_ENV_FILE": str(file)})


def _signal_group(launcher: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(launcher.pid, number)
    except ProcessLookupError:
        pass
