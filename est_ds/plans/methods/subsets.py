"""What `est`, `raptr` and `static` share: phases of random subnetworks of a given size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, Field

from est_ds.errors import UserError
from est_ds.plans.draw import UNITS, Address
from est_ds.plans.layers import (
    LayerDraw,
    Skip,
    assemble,
    check_skip,
    draw_kinds,
    resolve_layers,
)
from est_ds.plans.methods.base import Groups, Load, Method, MethodSettings, Scale
from est_ds.plans.phases import Phase, method_phases
from est_ds.plans.plan import Kept, Plan
from est_ds.plans.shape import Attention, ModelShape
from est_ds.plans.units import Counts, HeadRule, UnitDraw, exact_count, unit_draw

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]


def _check_amount(value: int | float) -> int | float:
    if value <= 0 or (isinstance(value, float) and value > 1.0):
        raise ValueError("must be a number of layers (whole, at least 1) or a fraction in (0, 1]")
    return value


Amount = Annotated[int | float, AfterValidator(_check_amount)]


class SubsetSettings(MethodSettings):
    """The settings that do not change from phase to phase.

    Attributes:
        head_rule: the same number of query heads in every key/value group, or whole groups.
        counts: exactly `round(fraction * n)` layers, heads and columns, or each on its own.
        skip: whole layers, or attention and MLP of a layer apart.
        always_keep: layers that are never skipped; -1 is the last.
        balance_groups: number of bands of layers, or their lengths, among which the kept ones
            are spread.
        scale: factors on the outputs of the layers that are kept.
    """

    head_rule: HeadRule = "within_groups"
    counts: Counts = "exact"
    skip: Skip = "layer"
    always_keep: list[int] = []
    balance_groups: Groups | None = None
    scale: Scale = Scale()


@dataclass(frozen=True)
class PhaseSize:
    """What one phase keeps: fractions, or a number of layers.

    Attributes:
        field: where the run file says so, for errors.
    """

    field: str
    layers: int | float
    heads: float
    columns: float
    always_keep: list[int] | None = None


class _PhaseDraw:
    """One phase, with all that does not change from step to step."""

    def __init__(self, size: PhaseSize, settings: SubsetSettings, shape: ModelShape) -> None:
        self.settings, self.size, self.shape = settings, size, shape
        n = shape.num_layers
        listed, field = settings.always_keep, "method.always_keep"
        if size.always_keep is not None:
            listed, field = size.always_keep, f"{size.field}always_keep"
        always = resolve_layers(listed, n, field)
        self.layer_draw = LayerDraw(n, settings.balance_groups, always)
        self.count, self.keep = self._amounts(n)
        if settings.counts == "exact":
            chances = self.layer_draw.exact_probabilities(self.count)
        else:
            chances = self.layer_draw.bernoulli_probabilities(self.keep)
        self.skips_layers = bool((chances < 1).any())
        self.factors = settings.scale.factors(chances)
        self.units = tuple(
            tuple(
                unit_draw(
                    part,
                    heads=size.heads,
                    columns=size.columns,
                    head_rule=settings.head_rule,
                    counts=settings.counts,
                )
                for part in parts
            )
            for parts in shape.layers
        )
        self._check_units()
        self.loads = tuple(_load(c, u) for c, u in zip(chances.tolist(), self.units))

    def _amounts(self, n: int) -> tuple[int, np.ndarray]:
        """The exact count of layers, and the chances that give it on average."""
        layers, field = self.size.layers, f"{self.size.field}layers"
        if isinstance(layers, int):
            if layers > n:
                raise UserError(f"{field}={layers}: the model has {n} layers; use 1 to {n}.")
            mean = float(layers)
        else:
            mean = layers * n
        exact = self.settings.counts == "exact"
        count = exact_count(mean / n, n)
        if isinstance(layers, float) and layers < 1 and exact and count == n:
            less = f", or at most {(n - 1) / n:.3g}" if n > 1 else ""
            raise UserError(
                f"{field}={layers} keeps all {n} of {n} layers (counts are rounded); use 1.0{less}."
            )
        always, floors = self.layer_draw.always, self.layer_draw.floors
        least = sum(floors) if exact else len(always)
        if (count if exact else mean) < least:
            keeps = count if exact else f"{mean:g}"
            raise UserError(
                f"{field}={layers} keeps {keeps} of {n} layers, but always_keep and "
                f"balance_groups need at least {least} (one in every band); use at least "
                f"{least if isinstance(layers, int) else f'{least / n:.3g}'}."
            )
        keep = np.full(n, (mean - len(always)) / max(1, n - len(always)))
        keep[list(always)] = 1.0
        return count, keep

    def _check_units(self) -> None:
        if self.size.heads < 1.0 and not self.shape.has_attention:
            raise UserError(
                f"{self.size.field}heads={self.size.heads} cannot take effect with "
                f"model.model_type={self.shape.family!r}, which has no attention: its inner "
                f"channels, or heads of a Mamba2, are columns; use {self.size.field}columns."
            )
        for units in (u for layer in self.units for u in layer):
            name = "heads" if isinstance(units.part, Attention) else "columns"
            if units.lifted:
                group = "key/value group" if name == "heads" else "group (model.n_groups)"
                other = ", or method.head_rule=groups" if name == "heads" else ""
                raise UserError(
                    f"{self.size.field}{name}={units.fraction} keeps none of the {units.size} "
                    f"heads of a {group} (counts are rounded), but every group needs one; use at "
                    f"least {1 / units.size:.3g}{other}."
                )
            if units.takes_effect:
                continue
            of = f"{units.size} {name}"
            if name == "heads" and units.with_groups:
                of = f"{units.size} key/value groups"
            elif name == "heads":
                of = f"{units.size} heads of a key/value group"
            elif units.rows > 1:
                of = f"{units.size} heads of a group (model.n_groups)"
            most = f", or at most {(units.size - 1) / units.size:.3g}" if units.size > 1 else ""
            raise UserError(
                f"{self.size.field}{name}={units.fraction} keeps all {of} (counts are rounded), so "
                f"it cannot take effect; use 1.0{most}."
            )

    def draw(self, step: int, phase: int, address: Address) -> Plan:
        """The plan of `step`, drawn at an address."""
        kinds = draw_kinds(self.settings.skip, self.shape)
        kept = [self._draw_layers(address, kind) for kind in kinds]

        def draw_part(i: int, p: int) -> Kept:
            return self.units[i][p].kept(address, UNITS + p, i)

        return Plan(step, phase, assemble(self.shape, kept, self.factors, draw_part))

    def _draw_layers(self, address: Address, kind: int) -> set[int]:
        if self.settings.counts == "exact":
            return set(self.layer_draw.exact(address, kind, self.count))
        return set(self.layer_draw.bernoulli(address, kind, self.keep))


def _load(chance: float, layer: tuple[UnitDraw, ...]) -> Load:
    means = [units.expected for units in layer]
    return Load(chance, tuple(u for u, _ in means), tuple(g for _, g in means))


class PhasedSubsets(Method):
    """A method whose phases keep a uniform random subnetwork of constant size."""

    Settings: ClassVar[type[SubsetSettings]]

    def __init__(self, settings: Any, *, seed: int, steps: int, shape: ModelShape) -> None:
        super().__init__(settings, seed=seed, steps=steps, shape=shape)
        check_skip(settings.skip, shape)
        self.phases = self._phases(settings, steps)
        self._draws = [_PhaseDraw(size, settings, shape) for size in self._sizes(settings)]
        if settings.balance_groups is not None:
            self.band_lengths = self._draws[0].layer_draw.lengths
        self._refuse_settings_without_effect()

    def _phases(self, settings: Any, steps: int) -> tuple[Phase, ...]:
        names = [f"phase_{i + 1}" for i in range(len(settings.phases))]
        return method_phases(settings.phases, names, steps)

    def _sizes(self, settings: Any) -> list[PhaseSize]:
        return [
            PhaseSize(f"method.phases[{i}].", p.layers, p.heads, p.columns, p.always_keep)
            for i, p in enumerate(settings.phases)
        ]

    def _address(self, step: int) -> int:
        """The step under which the draws of `step` are addressed."""
        return step

    def plan(self, step: int, micro_batch: int = 0) -> Plan:
        phase = self.phase_at(step)
        address = Address(self.seed, self._address(step), micro_batch)
        return self._draws[phase].draw(step, phase, address)

    def loads(self, step: int) -> tuple[Load, ...]:
        return self._draws[self.phase_at(step)].loads

    def _refuse_settings_without_effect(self) -> None:
        """Refuses what differs from its default and yet changes nothing.

        `head_rule: within_groups` passes in a run that drops no heads: it is the default.
        """
        settings, sizes = self.settings, [d.size for d in self._draws]
        default = type(settings).model_fields
        no_skips = not any(d.skips_layers for d in self._draws)
        no_heads = all(s.heads == 1.0 for s in sizes)
        everything = no_skips and no_heads and all(s.columns == 1.0 for s in sizes)
        for field, value, idle, why in (
            ("skip", settings.skip, no_skips, "no phase skips layers"),
            ("always_keep", settings.always_keep, no_skips, "no phase skips layers"),
            ("scale", settings.scale, no_skips, "no phase skips layers"),
            ("head_rule", settings.head_rule, no_heads, "no phase drops heads"),
            ("counts", settings.counts, everything, "every phase keeps everything"),
            ("compute", settings.compute, everything, "every phase keeps everything"),
            ("draw", settings.draw, everything, "every phase keeps everything"),
        ):
            if idle and value and value != default[field].default:
                shown = (
                    f"scale.layers={settings.scale.layers}"
                    if field == "scale"
                    else f"{field}={value}"
                )
                raise UserError(
                    f"method.{shown} cannot take effect: {why}; remove it, or lower a phase's "
                    f"{'heads' if field == 'head_rule' else 'layers'}."
                )
        for d in self._draws:
            if d.size.always_keep and not d.skips_layers:
                raise UserError(
                    f"{d.size.field}always_keep={d.size.always_keep} cannot take effect: the phase "
                    f"skips no layers; remove it, or lower {d.size.field}layers."
                )
