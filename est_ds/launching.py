"""Starts the real `deepspeed` launcher on this machine, and ends it with this process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TextIO

import torch

from est_ds import runtime
from est_ds.config import RunConfig
from est_ds.errors import UserError


POLL_S = 0.005


def default_processes(config: RunConfig) -> int:
    """Every GPU; without GPUs what the run file says, or one replica."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return config.parallel.processes or config.parallel.pipe


def check_processes(processes: int) -> None:
    """Refuses more processes than GPUs.

    Raises:
        UserError: there are too few GPUs.
    """
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UserError(
            f"--processes={processes}: this machine has {torch.cuda.device_count()} GPUs; use at "
            f"most that many, or more machines with the deepspeed launcher."
        )


def launch(
    arguments: list[str],
    processes: int,
    log: TextIO | None = None,
    kill_when: Callable[[], bool] | None = None,
) -> int:
    """Starts est-ds `processes` times under the launcher, and waits.

    A signal to this process ends all of them; so does its death, which the processes notice.

    Args:
        arguments: the command line of est-ds.
        log: takes what they print; None: this process's own output does.
        kill_when: asked every few milliseconds; once it is true, all are killed (SIGKILL), as
            they are when a machine is lost.

    Returns:
        Exit code: 0, 1 or 2 as the processes', 128 + n after signal n.
    """
    environment = dict(os.environ, **{runtime.STARTER: str(os.getpid())})
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // processes)))
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        # A hostfile of the whole cluster may lie at the launcher's default place.
        *("--hostfile", os.devnull),
        *("--num_accelerators", str(processes)),
        *("--master_port", str(_free_port())),
        *("--log_level", "error", "--quiet"),
        "--no_local_rank",
        *("--module", "est_ds.cli"),
        *arguments,
    ]
    sys.stdout.flush()
    # A session of its own: the launcher passes no SIGTERM on, so its whole group is signalled.
    launcher = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=log, stderr=log
    )
    received: list[int] = []

    def end(number: int, frame: object) -> None:
        received.append(number)
        _signal_group(launcher, signal.SIGTERM)

    former = {
        number: signal.signal(number, end)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN  # as under nohup
    }
    try:
        while kill_when is not None and not received and launcher.poll() is None:
            if kill_when():
                received.append(signal.SIGKILL)
                _signal_group(launcher, signal.SIGKILL)
            time.sleep(POLL_S)
        code = launcher.wait()
        _signal_group(launcher, signal.SIGKILL)  # whatever outlived the launcher
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code in (0, 2) else 1


def _signal_group(launcher: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(launcher.pid, number)
    except ProcessLookupError:
        pass


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
