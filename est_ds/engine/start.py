"""Starts DeepSpeed quietly: the import, the process group, and what it logs."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from est_ds.engine.patches import compile_nothing_at_start, load_no_compiler
from est_ds.errors import UserError
from est_ds.ranks.meeting import Meeting, choose_interface, meet
from est_ds.ranks.world import World, meeting_place


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what libraries print at start off the screen; errors still raise."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def start_processes(
    world: World, limit_s: float = 600.0, reached: Callable[[dist.Store], None] | None = None
) -> Meeting:
    """Joins the process group that the launcher described: gloo on CPU, NCCL on GPUs.

    Args:
        limit_s: how long to wait for the other processes.
        reached: is given the store as soon as rank 0 answers.

    Raises:
        Failure: some do not come, or rank 0 cannot be reached.
        UserError: they run different versions, or there is no GPU for this one.
    """
    _take_device(world)
    address, port = meeting_place(world)
    numbers = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    meeting = meet(world, limit_s, reached)
    if (interface := choose_interface(os.environ, meeting)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    os.environ["MASTER_PORT"] = str(meeting.port)
    # DeepSpeed 0.19 calls what torch 2.13 will rename; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    with quiet():
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        logging.getLogger("torch").setLevel(logging.ERROR)
        compile_nothing_at_start()
        load_no_compiler()
        # As under torchrun: the group joins a store that is there, instead of opening one.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        # Longer than the watchdog waits, which says more than gloo or NCCL.
        deepspeed.init_distributed(timeout=timedelta(seconds=2 * limit_s + 60))
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    return meeting


def _take_device(world: World) -> None:
    """Makes this process's GPU the current one: what ranks exchange before there is an engine,
    which does it too, would else all lie on the first GPU, where NCCL refuses it.

    Raises:
        UserError: there are fewer GPUs.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return
    visible = torch.cuda.device_count()
    if world.local_rank >= visible:
        raise UserError(
            f"LOCAL_RANK={world.local_rank}: this process sees {visible} GPUs; let every process "
            f"see all GPUs of its node (CUDA_VISIBLE_DEVICES), and start one for each at most."
        )
    torch.cuda.set_device(world.local_rank)


def leave_processes(code: int = 0) -> NoReturn:
    """Leaves the process group and ends this process with an exit code.

    Without Python's and C++'s own end, which now and then aborts the process when gloo's threads
    outlive what they belong to.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
