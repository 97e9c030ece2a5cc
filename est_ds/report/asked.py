"""What `est-ds plan` is asked for beside phases and FLOPs. No torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from est_ds.cost.gpus import Gpu, gpu_of
from est_ds.errors import UserError


@dataclass(frozen=True)
class Asked:
    """Options of `est-ds plan`.

    Attributes:
        gpu: what the run is to train on; None: not said.
        processes: of the run, one on each GPU; None: what the run file says.
    """

    gpu: Gpu | None = None
    processes: int | None = None

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> Asked:
        """Checks the options of a command line.

        Raises:
            UserError: one is unknown, or cannot take effect.
        """
        if parsed.count and not parsed.gpu:
            raise UserError(
                f"--count={parsed.count} has no effect without --gpu; say which GPU, or use "
                f"--processes."
            )
        if parsed.count and parsed.processes not in (None, parsed.count):
            raise UserError(
                f"--count={parsed.count} and --processes={parsed.processes} differ, and every GPU "
                f"has one process; remove one of them."
            )
        gpu = gpu_of(parsed.gpu) if parsed.gpu else None
        return cls(gpu=gpu, processes=parsed.count or parsed.processes)


NOTHING = Asked()
