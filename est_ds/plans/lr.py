"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from est_ds.config.schedule import AnySchedule, Cosine, InverseSqrt, Wsd
from est_ds.errors import UserError
from est_ds.plans.phases import Phase, phase_at, to_step


def _length(position: int | float, steps: int, field: str) -> int:
    return 0 if position == 0 else to_step(position, steps, field)


def check_schedule(schedule: AnySchedule, steps: int, phases: tuple[Phase, ...]) -> None:
    """Checks that warm-up and decay fit into the run, and warming again into the phases.

    Args:
        phases: of the method.

    Raises:
        UserError: they do not, or there is nothing after which to warm again.
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
    if schedule.rewarm is None:
        return
    if len(phases) == 1:
        raise UserError(
            "schedule.rewarm cannot take effect: the method has one phase, and so no boundary; "
            "remove it, or choose a method with phases."
        )
    again = to_step(schedule.rewarm.steps, steps, "schedule.rewarm.steps")
    if again < 2:
        raise UserError(
            f"schedule.rewarm.steps={schedule.rewarm.steps} cannot take effect: it is {again} of "
            f"steps={steps}, and a rise so short begins at the whole rate; use at least 2, or "
            f"remove schedule.rewarm."
        )
    for phase in phases[1:]:
        if (length := phase.until_step - phase.from_step) < again:
            raise UserError(
                f"schedule.rewarm.steps={schedule.rewarm.steps} is {again} steps, but phase "
                f"{phase.name!r} has only {length}: it would end before the rate has risen; use "
                f"at most {length}."
            )


def learning_rate(
    schedule: AnySchedule, peak: float, step: int, steps: int, phases: tuple[Phase, ...] = ()
) -> float:
    """The rate of `step`: that of the schedule, times the factor of the step's phase, and, in the
    first n steps after a boundary where the schedule warms again, times 1/n, 2/n, ... 1.

    A schedule of T steps begins with a linear warm-up of W steps. Behind it, step t being 0 for the
    first step and the lowest rate that of the last one:

    - cosine: half a cosine to `final` x peak.
    - linear: peak x (T - t) / (T - W) with `final` 0, as the learning rate of BERT (its
      optimization.py; there the line begins at step 0, under the warm-up); else to `final` x peak,
      which the step after the last one would have.
    - inverse_sqrt: peak x sqrt(W / (t + 1)) (arXiv 1706.03762, section 5.3).
    - wsd (warm-up, stable, decay; arXiv 2404.06395): constant, then a fall to `final` x peak, in
      proportion to the share of the decay that is done, or to its root (arXiv 2405.18392, "1 -
      sqrt").

    Args:
        phases: of the method; without them, as if it had one.
    """
    rate = _scheduled(schedule, peak, step, steps)
    if not phases:
        return rate
    i = phase_at(phases, step)
    rate *= phases[i].lr
    if schedule.rewarm is not None and i > 0:
        again = to_step(schedule.rewarm.steps, steps, "schedule.rewarm.steps")
        rate *= min(1.0, (step - phases[i].from_step + 1) / again)
    return rate


def _scheduled(schedule: AnySchedule, peak: float, step: int, steps: int) -> float:
    warmup = _length(schedule.warmup, steps, "schedule.warmup")
    if step < warmup:
        return peak * (step + 1) / warmup
    if isinstance(schedule, InverseSqrt):
        return peak * math.sqrt(max(1, warmup) / (step + 1))
    if isinstance(schedule, Wsd):
        decay = _length(schedule.decay, steps, "schedule.decay")
        done = (step - (steps - decay) + 1) / decay if step >= steps - decay else 0.0
        fallen = math.sqrt(done) if schedule.shape == "sqrt" else done
        return peak * (1.0 - fallen * (1.0 - schedule.final))
    if isinstance(schedule, Cosine):
        progress = (step - warmup) / max(1, steps - 1 - warmup)
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        left = (steps - step) / (steps - warmup)
    return peak * (schedule.final + (1.0 - schedule.final) * left)
