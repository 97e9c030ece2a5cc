"""`est`: Evolving Subnetwork Training (arXiv 2406.06962).

In every phase each step trains a uniform random subnetwork of fixed size: a fraction of the
layers, and in every kept layer a fraction of the query heads and of the MLP columns.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from est_ds.config import Strict
from est_ds.errors import UserError
from est_ds.plans import balance, draw
from est_ds.plans.methods.base import Load, Method
from est_ds.plans.phases import phases_until
from est_ds.plans.plan import Kept, LayerPlan, Plan
from est_ds.plans.shape import Attention, Part

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]


class EstPhase(Strict):
    """One phase: where it ends (a step, or a fraction of the run) and what it keeps."""

    name: str | None = None
    until: int | float
    layers: Fraction = 1.0
    heads: Fraction = 1.0
    columns: Fraction = 1.0


class Scale(Strict):
    layers: Literal["none", "inverse", "sqrt"] = "none"


class EstSettings(Strict):
    name: Literal["est"]
    phases: Annotated[list[EstPhase], Field(min_length=1)]
    head_rule: Literal["within_groups", "groups"] = "within_groups"
    always_keep: list[int] = []
    balance_groups: Annotated[int, Field(ge=1)] | list[int] | None = None
    scale: Scale = Scale()


def exact_count(fraction: float, n: int) -> int:
    """round(fraction * n), at least 1 (halves go to the even count, as Python rounds)."""
    return max(1, round(fraction * n))


class Est(Method):
    Settings = EstSettings

    def __init__(self, settings: EstSettings, *, seed, steps, shape) -> None:
        super().__init__(settings, seed=seed, steps=steps, shape=shape)
        names = [p.name or f"phase_{i + 1}" for i, p in enumerate(settings.phases)]
        until = [p.until for p in settings.phases]
        self.phases = phases_until(names, until, steps, "method.phases")
        num_layers = shape.num_layers
        self.always_keep = self._resolve_always_keep(settings.always_keep, num_layers)
        lengths = (num_layers,)
        if settings.balance_groups is not None:
            lengths = balance.run_lengths(settings.balance_groups, num_layers)
            self.run_lengths = lengths
        ends = np.cumsum(lengths)
        self._runs = [range(end - n, end) for end, n in zip(ends.tolist(), lengths)]
        self._fixed = [[i for i in run if i in self.always_keep] for run in self._runs]
        self._floors = tuple(max(1, len(fixed)) for fixed in self._fixed)
        self._lengths = lengths
        for i, phase in enumerate(settings.phases):
            kept, least = exact_count(phase.layers, num_layers), sum(self._floors)
            if kept < least:
                raise UserError(
                    f"method.phases[{i}].layers={phase.layers} keeps {kept} of {num_layers} "
                    f"layers, but always_keep and balance_groups need at least {least} (one in "
                    f"every run); use at least {least / num_layers:.3g}."
                )

    @staticmethod
    def _resolve_always_keep(listed: list[int], num_layers: int) -> frozenset[int]:
        for i in listed:
            if not -num_layers <= i < num_layers:
                raise UserError(
                    f"method.always_keep holds {i}: the model has {num_layers} layers; use "
                    f"{-num_layers} to {num_layers - 1}."
                )
        return frozenset(i % num_layers for i in listed)

    def plan(self, step: int) -> Plan:
        phase = self.phase_at(step)
        fractions = self.settings.phases[phase]
        kept_layers = self._draw_layers(step, exact_count(fractions.layers, self.shape.num_layers))
        scale = self._layer_scale(len(kept_layers))
        layers: list[LayerPlan | None] = [None] * self.shape.num_layers
        for i in kept_layers:
            parts = tuple(
                self._draw_part(step, i, p, part, fractions)
                for p, part in enumerate(self.shape.layers[i])
            )
            layers[i] = LayerPlan(parts, 1.0 if i in self.always_keep else scale)
        return Plan(step, phase, tuple(layers))

    def loads(self, step: int) -> tuple[Load, ...]:
        fractions = self.settings.phases[self.phase_at(step)]
        # Layers of one shape cost the same, so the mean over the draws is exact for every plan.
        probability = exact_count(fractions.layers, self.shape.num_layers) / self.shape.num_layers
        loads = []
        for layer in self.shape.layers:
            kept = [self._counts(part, fractions) for part in layer]
            loads.append(Load(probability, tuple(k for k, _ in kept), tuple(g for _, g in kept)))
        return tuple(loads)

    def _draw_layers(self, step: int, count: int) -> list[int]:
        """Kept layers, drawn in every run from those that are not always kept."""
        if count == self.shape.num_layers:
            return list(range(count))
        kept: list[int] = []
        for r, n in enumerate(balance.spread(count, self._lengths, self._floors, step)):
            free = [i for i in self._runs[r] if i not in self.always_keep]
            drawn = draw.subset(
                self.seed, draw.LAYERS, r, step, len(free), n - len(self._fixed[r])
            )
            kept += self._fixed[r] + [free[i] for i in drawn]
        return sorted(kept)

    def _layer_scale(self, count: int) -> float:
        """Inverse (or its root) of the chance that a layer which may be skipped is kept."""
        fixed = len(self.always_keep)
        if self.settings.scale.layers == "none" or count == self.shape.num_layers:
            return 1.0
        inverse = (self.shape.num_layers - fixed) / max(1, count - fixed)
        return inverse if self.settings.scale.layers == "inverse" else inverse**0.5

    def _counts(self, part: Part, fractions: EstPhase) -> tuple[int, int]:
        """Kept units and kept key/value heads of a part (0 for an MLP)."""
        if not isinstance(part, Attention):
            return exact_count(fractions.columns, part.columns), 0
        per_group = part.heads // part.groups
        if self.settings.head_rule == "groups":
            groups = exact_count(fractions.heads, part.groups)
            return groups * per_group, groups
        return part.groups * exact_count(fractions.heads, per_group), part.groups

    def _draw_part(self, step: int, layer: int, p: int, part: Part, fractions: EstPhase) -> Kept:
        units, groups = self._counts(part, fractions)
        if units == part.units:
            return Kept(None, part.units)
        kind = draw.UNITS + p
        if not isinstance(part, Attention):
            return Kept(draw.subset(self.seed, kind, layer, step, part.units, units), part.units)
        per_group = part.heads // part.groups
        if self.settings.head_rule == "groups":
            kept = draw.subset(self.seed, kind, layer, step, part.groups, groups)
            heads = (kept[:, None] * per_group + np.arange(per_group)).reshape(-1)
            return Kept(heads, part.heads, groups=kept)
        heads = draw.subset_per_group(
            self.seed, kind, layer, step, part.groups, per_group, units // part.groups
        )
        return Kept(heads, part.heads)
