"""What every method is: a pure function from a step to a plan, with settings of its own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from est_ds.config.strict import Strict
from est_ds.errors import UserError
from est_ds.plans.growth import Growth
from est_ds.plans.phases import Phase, phase_at
from est_ds.plans.plan import Plan, StepPlans
from est_ds.plans.shape import ModelShape


@dataclass(frozen=True)
class Load:
    """How much of one layer is kept, or computed.

    Attributes:
        probability: chance that the layer is kept, or each of its parts if they are skipped apart.
        units: kept heads or columns of every part, on average.
        key_value_groups: kept key/value heads of every part (0 for an MLP), on average.
        positions: share of a sequence's positions that pass through the layer, on average.
        squared: the same of its square, by which attention's scores go.
    """

    probability: float
    units: tuple[float, ...]
    key_value_groups: tuple[float, ...]
    positions: float = 1.0
    squared: float = 1.0


SAVES_NOTHING = "everything is computed, and what is not kept multiplied by zero: it saves nothing"


class MethodSettings(Strict):
    """What every method can set.

    Attributes:
        compute: `sliced`: only what is kept is computed. `masked`: everything is, and what is not
            kept is multiplied by zero, with the same rescaling: structural dropout. The same plans
            and, but for rounding, the same training; it saves nothing.
        draw: `step`: one plan for all micro-batches of a step, on all replicas. `micro_batch`:
            one for each, whose gradients add up to those of all that any of them keeps. Phases,
            exact counts and how they are spread over bands depend on the step alone.
    """

    compute: Literal["sliced", "masked"] = "sliced"
    draw: Literal["step", "micro_batch"] = "step"


Groups = Annotated[int, Field(ge=1)] | list[int]


class Scale(Strict):
    """Factor on the outputs of a layer that may be skipped.

    Attributes:
        layers: `none`: 1; `inverse`: 1 / the layer's chance to be kept; `sqrt`: the root of that.
    """

    layers: Literal["none", "inverse", "sqrt"] = "none"

    def factors(self, chances: np.ndarray) -> list[float]:
        """A factor for every layer from its chance to be kept (1.0 where that is 0).

        Rounded, so that processors that differ in the last bit of a chance agree on the plan.
        """
        if self.layers == "none":
            return [1.0] * len(chances)
        inverse = [1.0 / c if c > 0 else 1.0 for c in chances.tolist()]
        return [round(x if self.layers == "inverse" else math.sqrt(x), 12) for x in inverse]


class Method(ABC):
    """A schedule of plans.

    Attributes:
        Settings: the pydantic model of the method's section of the run file.
        phases: the step ranges of the schedule.
        draws: whether a plan is drawn anew at every step.
        band_lengths: bands of layers over which kept layers are spread; a pipeline may cut only
            at their ends. None: no promise is made.
    """

    Settings: ClassVar[type[MethodSettings]]
    settings: Any  # of type `Settings`
    phases: tuple[Phase, ...]
    draws: ClassVar[bool] = True
    band_lengths: tuple[int, ...] | None = None

    def __init__(
        self, settings: MethodSettings, *, seed: int, steps: int, shape: ModelShape
    ) -> None:
        self.settings, self.seed, self.steps, self.shape = settings, seed, steps, shape
        if self.by_micro_batch and not self.draws:
            raise UserError(
                f"method.draw=micro_batch cannot take effect with method.name="
                f"{self.settings.name!r}, which draws no plan anew at every step; remove it."
            )

    @property
    def masked(self) -> bool:
        """Whether everything is computed, and what is not kept multiplied by zero."""
        return self.settings.compute == "masked"

    @property
    def by_micro_batch(self) -> bool:
        """Whether every micro-batch has a plan of its own."""
        return self.settings.draw == "micro_batch"

    def phase_at(self, step: int) -> int:
        """Returns the number of the phase that a step belongs to."""
        return phase_at(self.phases, step)

    def phase_of(self, step: int) -> Phase:
        """Returns the phase that a step belongs to."""
        return self.phases[self.phase_at(step)]

    @abstractmethod
    def plan(self, step: int, micro_batch: int = 0) -> Plan:
        """The plan of `step`; the same on every rank, in every layout, at every time.

        Args:
            micro_batch: index in the global batch, whose micro-batch i has the rows from
                i * batch.micro on; without `draw: micro_batch` 0.
        """

    def plans(self, step: int, micro_batches: int) -> StepPlans:
        """The plans of `step`: one for all micro-batches, or one for each.

        Args:
            micro_batches: of the global batch.
        """
        return StepPlans(
            step, micro_batches if self.by_micro_batch else 1, partial(self.plan, step)
        )

    @abstractmethod
    def loads(self, step: int) -> tuple[Load, ...]:
        """What is kept of every layer at `step`, expected; exact where counts are exact."""

    def computed(self, kept: tuple[Load, ...]) -> tuple[Load, ...]:
        """What is computed where so much is kept."""
        return full_loads(self.shape) if self.masked else kept

    def growth(self, step: int) -> Growth | None:
        """What happens to the model's depth before `step` is trained; None: nothing."""
        return None

    def whole(self, step: int) -> Plan | None:
        """The model as it is at `step`, for evaluation; None: the full model."""
        return None

    def depth(self, step: int) -> int:
        """Layers of the model that is evaluated at `step`."""
        return len(self.layers(step))

    def layers(self, step: int) -> list[int]:
        """The layers that exist when `step` is done."""
        whole = self.whole(step)
        return list(range(self.shape.num_layers)) if whole is None else sorted(whole.kept_layers)

    def mean_loads(self, phase: int) -> tuple[Load, ...]:
        """Loads averaged over the steps of a phase; they are constant unless a method says so."""
        return self.loads(self.phases[phase].from_step)


def full_loads(shape: ModelShape) -> tuple[Load, ...]:
    """The loads of the dense model."""
    return tuple(
        Load(
            1.0,
            tuple(p.units for p in layer),
            tuple(getattr(p, "key_value_groups", 0) for p in layer),
        )
        for layer in shape.layers
    )


def plan_loads(plan: Plan, shape: ModelShape) -> tuple[Load, ...]:
    """The loads of one drawn plan."""
    loads = []
    for dense, layer in zip(full_loads(shape), plan.layers):
        if layer is None:
            loads.append(Load(0.0, dense.units, dense.key_value_groups))
            continue
        groups = tuple(
            g if kept.key_value_groups is None else len(kept.key_value_groups)
            for kept, g in zip(layer.parts, dense.key_value_groups)
        )
        share = 1.0
        if layer.positions is not None:
            assert shape.sequence is not None  # of the run
            share = len(layer.positions) / shape.sequence
        counts = tuple(kept.count for kept in layer.parts)
        loads.append(Load(1.0, counts, groups, share, share**2))
    return tuple(loads)
