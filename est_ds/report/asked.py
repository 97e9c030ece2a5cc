"""What `est-ds plan` is asked for beside phases and FLOPs. No torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from est_ds.cost.gpus import Gpu, gpu_of
from est_ds.errors import UserError
from est_ds.run.step_times import StepTimes


@dataclass(frozen=True)
class Asked:
    """Options of `est-ds plan`.

    Attributes:
        gpu: what the run is to train on; None: not said.
        processes: of the run, one on each GPU; None: what the run file says.
        price: of an hour of one GPU; None: not said.
        measures: whether steps are measured here.
        layouts: whether layouts are compared.
        times: what was measured.
    """

    gpu: Gpu | None = None
    processes: int | None = None
    price: float | None = None
    measures: bool = False
    layouts: bool = False
    times: StepTimes | None = None

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> Asked:
        """Checks the options of a command line.

        Raises:
            UserError: one is unknown, or cannot take effect.
        """
        if parsed.count and parsed.gpu is None:
            raise UserError(
                f"--count={parsed.count} has no effect without --gpu; say which GPU, or use "
                f"--processes."
            )
        if parsed.count and parsed.processes not in (None, parsed.count):
            raise UserError(
                f"--count={parsed.count} and --processes={parsed.processes} differ, and every GPU "
                f"has one process; remove one of them."
            )
        if parsed.measure and parsed.gpu is not None:
            raise UserError(
                f"--measure and --gpu={parsed.gpu} contradict each other: what is measured is the "
                f"time on this machine; remove one of them."
            )
        if parsed.price and not parsed.measure and parsed.gpu is None:
            raise UserError(
                f"--price={parsed.price:g} has no effect without --gpu, or --measure: there are no "
                f"hours to pay for."
            )
        if parsed.layouts and parsed.gpu is None:
            raise UserError("--layouts has no effect without --gpu; say which GPU, and --count.")
        return cls(
            gpu=None if parsed.gpu is None else gpu_of(parsed.gpu),
            processes=parsed.count or parsed.processes,
            price=parsed.price,
            measures=parsed.measure,
            layouts=parsed.layouts,
        )


NOTHING = Asked()
