"""Held-out losses on both sides of a phase boundary, at the weights between two steps.

Phases of a method that samples have the same weights on both sides: what changes is which
subnetworks they are for. A model that grows has those before and after its growth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from est_ds.engine.base import Engine
from est_ds.plans.plan import Plan
from est_ds.run.prepare import Run
from est_ds.training.evaluate import held_out

PLANS = 4  # plans of a phase whose losses are averaged


@dataclass(frozen=True)
class Side:
    """One side of a boundary.

    Attributes:
        name: `before` or `after`.
        phase: the phase on this side.
        full: held-out loss of the full model (of one that grows, as deep as it is), nats per
            token; of several corpora the mean.
        subnetwork: mean of those of `plans` plans: of the last steps of the phase before, or of
            the first ones of the phase after.
    """

    name: str
    phase: str
    full: float
    subnetwork: float
    plans: int

    @property
    def entry(self) -> dict[str, Any]:
        """What stands in `metrics.jsonl`."""
        return {
            "boundary": self.name,
            "phase": self.phase,
            "full_loss": self.full,
            "subnetwork_loss": self.subnetwork,
            "plans": self.plans,
        }


def is_boundary(run: Run, step: int) -> bool:
    """Whether a phase other than the first begins with a step."""
    return 0 < step == run.method.phase_of(step).from_step


@dataclass(frozen=True)
class Boundary:
    """A boundary, at the weights that the engine has when a side is asked for.

    Attributes:
        step: the first of the phase after.
        interrupted: asked by every rank from time to time; once it says so, a side is None.
    """

    run: Run
    engine: Engine
    step: int
    interrupted: Callable[[], bool]

    def side(self, name: str, full: float | None = None) -> Side | None:
        """Returns the losses on a side. Every rank calls it.

        Args:
            name: `before` or `after`.
            full: the full model's loss, where it is known.
        """
        method, steps = self.run.method, self._steps(name)
        whole = method.whole(steps[0])
        if full is None:
            full = self._loss(whole)
        losses = []
        for plan in (method.plan(s) for s in steps):
            same = plan.is_full if whole is None else plan.digest == whole.digest
            losses.append(full if same else self._loss(plan))
        known = [loss for loss in losses if loss is not None]
        if full is None or len(known) < len(losses):
            return None
        phase = method.phase_of(steps[0]).name
        return Side(name, phase, full, sum(known) / len(known), len(known))

    def _steps(self, name: str) -> range:
        """The steps whose plans stand for a side."""
        method, step = self.run.method, self.step
        number = PLANS if method.draws else 1
        if name == "before":
            return range(max(method.phase_of(step - 1).from_step, step - number), step)
        return range(step, min(method.phase_of(step).until_step, step + number))

    def _loss(self, plan: Plan | None) -> float | None:
        losses = held_out(self.run, self.engine, plan, self.interrupted)
        return None if losses is None else sum(losses.values()) / len(losses)
