"""Starts the real `deepspeed` launcher on this machine."""

from __future__ import annotations

import os
import socket
import sys

import torch

from est_ds.config import RunConfig
from est_ds.errors import UserError


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


def launch(arguments: list[str], processes: int) -> None:
    """Replaces this process by the launcher, which starts `est-ds` `processes` times.

    Args:
        arguments: the command line of est-ds.
    """
    environment = dict(os.environ)
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
    os.execve(sys.executable, command, environment)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
