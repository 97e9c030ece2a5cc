"""Starts DeepSpeed quietly: the import, the process group, and what it logs."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from est_ds.engine.patches import compile_nothing_at_start
from est_ds.ranks.meeting import Meeting, choose_interface, meet
from est_ds.ranks.world import PORT, World


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what libraries print at start off the screen; errors still raise."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def start_processes(world: World, limit_s: float = 600.0) -> Meeting:
    """Joins the process group that the launcher described: gloo on CPU, NCCL on GPUs.

    Args:
        limit_s: how long to wait for the other processes.

    Raises:
        Failure: some do not come, or rank 0 cannot be reached.
        UserError: they run different versions.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if world.size == 1 else str(PORT))
    # DeepSpeed 0.19 calls what torch 2.13 will rename; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    with quiet():
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        logging.getLogger("torch").setLevel(logging.ERROR)
    compile_nothing_at_start()
    meeting = meet(world, limit_s)
    if (interface := choose_interface(os.environ, meeting)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    os.environ["MASTER_PORT"] = str(meeting.port)
    # As under torchrun: the group joins a store that is there, instead of opening one.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    with quiet():
        # Longer than the watchdog waits, which says more than gloo or NCCL.
        deepspeed.init_distributed(timeout=timedelta(seconds=2 * limit_s + 60))
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    return meeting


def leave_processes(code: int = 0) -> NoReturn:
    """Leaves the process group and ends this process with an exit code.

    Without Python's and C++'s own end, which now and then aborts the process when gloo's threads
    outlive what they belong to.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
