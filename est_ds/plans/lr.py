"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from est_ds.config.sections import Cosine, Wsd
from est_ds.errors import UserError
from est_ds.plans.phases import to_step


def _length(position: int | float, steps: int, field: str) -> int:
    return 0 if position == 0 else to_step(position, steps, field)


def check_schedule(schedule: Cosine | Wsd, steps: int) -> None:
    """Checks that warm-up and decay fit into the run.

    Raises:
        UserError: they do not.
    """
    lengths = {"schedule.warmup": schedule.warmup}
    if isinstance(schedule, Wsd):
        lengths["schedule.decay"] = schedule.decay
    total = sum(_length(position, steps, field) for field, position in lengths.items())
    if total > steps:
        raise UserError(
            f"{' + '.join(lengths)} = {total} steps, more than steps={steps}; shorten it, or raise "
            f"steps."
        )


def learning_rate(schedule: Cosine | Wsd, peak: float, step: int, steps: int) -> float:
    """The rate of `step`.

    Cosine: linear warm-up, then half a cosine to `final` x peak. WSD (warm-up, stable, decay;
    arXiv 2404.06395): linear warm-up, constant, then a linear fall to `final` x peak.
    The lowest rate is that of the last step.
    """
    warmup = _length(schedule.warmup, steps, "schedule.warmup")
    if step < warmup:
        return peak * (step + 1) / warmup
    if isinstance(schedule, Wsd):
        decay = _length(schedule.decay, steps, "schedule.decay")
        done = (step - (steps - decay) + 1) / decay if step >= steps - decay else 0.0
        return peak * (1.0 - done * (1.0 - schedule.final))
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    falling = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.final + (1.0 - schedule.final) * falling)
