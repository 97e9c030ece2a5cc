"""Phases: ranges of optimizer steps within which a schedule is constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from est_ds.config.strict import Strict
from est_ds.errors import UserError


@dataclass(frozen=True)
class Phase:
    """Steps `from_step <= step < until_step`.

    Attributes:
        lr: factor on the learning rate of its steps.
    """

    name: str
    from_step: int
    until_step: int
    lr: float = 1.0


class PhaseSettings(Strict):
    """What a method with a list of phases says of each, whatever it keeps.

    Attributes:
        name: as metrics and report name it (default: from its number, or its depth).
        until: where it ends (a step, or a fraction of the run).
        lr: factor on the learning rate in it.
    """

    name: str | None = None
    until: int | float
    lr: Annotated[float, Field(gt=0.0)] = 1.0


def to_step(position: int | float, steps: int, field: str) -> int:
    """A position given as a step (integer) or as a fraction of the run (float in (0, 1])."""
    if isinstance(position, float):
        if not 0.0 < position <= 1.0:
            raise UserError(
                f"{field}={position}: a fraction of the run lies in (0, 1]; "
                f"write a whole number for a step."
            )
        return round(position * steps)
    return position


def phases_until(names: list[str], until: list[int | float], steps: int, field: str) -> tuple:
    """Phases from their ends.

    Args:
        until: the end of every phase, a step or a fraction of `steps`.
        field: the name of the list in the run file, for errors.

    Raises:
        UserError: the ends do not increase or the last is not `steps`.
    """
    phases, start = [], 0
    for i, (name, position) in enumerate(zip(names, until)):
        end = to_step(position, steps, f"{field}[{i}].until")
        if end <= start:
            raise UserError(
                f"{field}[{i}].until={position} is step {end} of steps={steps}, not after step "
                f"{start} where the phase starts; phases must increase: raise it, or raise steps."
            )
        phases.append(Phase(name, start, end))
        start = end
    if start != steps:
        raise UserError(
            f"{field}[{len(until) - 1}].until={until[-1]} ends at step {start} but steps={steps}; "
            f"the last phase must end at the last step: set it to {steps} or 1.0."
        )
    return tuple(phases)


def method_phases(
    settings: Sequence[PhaseSettings], names: list[str], steps: int
) -> tuple[Phase, ...]:
    """The phases of `method.phases`; see `phases_until`.

    Args:
        names: of those that have none of their own.
    """
    named = [phase.name or name for phase, name in zip(settings, names)]
    phases = phases_until(named, [phase.until for phase in settings], steps, "method.phases")
    return tuple(replace(phase, lr=asked.lr) for phase, asked in zip(phases, settings))


def phase_at(phases: tuple[Phase, ...], step: int) -> int:
    """Index of the phase that holds `step`."""
    for i, phase in enumerate(phases):
        if step < phase.until_step:
            return i
    raise ValueError(f"step {step} is beyond the last phase, which ends at {phases[-1].until_step}")
