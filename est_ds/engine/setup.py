"""Starts DeepSpeed quietly: the import, the process group, and what it logs."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

import torch
import torch.distributed as dist

from est_ds.runtime import World


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what libraries print at start off the screen; errors still raise."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def start_processes(world: World) -> None:
    """Joins the process group that the launcher described: gloo on CPU, NCCL on GPUs."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if world.size == 1 else "29500")
    # DeepSpeed 0.19 calls what torch 2.13 will rename; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    with quiet():
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        logging.getLogger("torch").setLevel(logging.ERROR)
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            # Its shared-memory reduction compiles C++ for a minute at the first start, and hangs
            # every later start if that is interrupted.
            sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
        deepspeed.init_distributed()


def leave_processes() -> NoReturn:
    """Leaves the process group and ends this process, with exit code 0.

    Without Python's and C++'s own end, which now and then aborts the process when gloo's threads
    outlive what they belong to.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
