"""`stacking`: the depth grows at phase boundaries, by copies of layers or by new ones.

The layers that do not exist yet have their places in the full model from the start, and are
skipped: cost and function are those of the shallow model, while engine, pipeline cuts and
checkpoints stay as they are. At a boundary layers are copied between places.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, field_validator, model_validator

from est_ds.errors import UserError
from est_ds.plans import balance
from est_ds.plans.growth import Growth
from est_ds.plans.methods.base import Groups, Load, Method, MethodSettings, full_loads
from est_ds.plans.phases import PhaseSettings, method_phases
from est_ds.plans.plan import Kept, LayerPlan, Plan

Mode = Literal["random", "identity", "double", "interleave", "gradual", "midas", "lidas"]
COPIES_NOTHING = ("random", "identity")


class StackingPhase(PhaseSettings):
    """One phase: where it ends, and the depth that it trains.

    Attributes:
        until: a step, or a fraction of the run; `alpha` of the method gives it to every phase.
        layers: their number (whole), or a fraction of the model's (with a point), at least one.
    """

    # `alpha` fills it in before this model is read.
    model_config = ConfigDict(json_schema_extra=lambda schema: schema["required"].remove("until"))

    layers: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0.0, le=1.0)]


class StackingSettings(MethodSettings):
    """How the depth grows.

    Attributes:
        mode: `random`: new layers on top, drawn as at the start of the run (arXiv 2511.04981 grows
            so, once, from depth 0 or 1 [note]); `identity`: new layers on top that compute the
            identity, since their output projections are zero (no paper's; 2511.04981 finds that
            zero initialisation blocks feature learning [note]); `double`: the whole stack again on
            top (StackBERT, Gong et al. 2019; four times in G_stack, arXiv 2405.15319);
            `interleave`: every layer again behind itself (arXiv 2511.04981 [note]); `gradual`: the
            last layers again on top (gradual stacking, arXiv 2402.05913 section 2); `midas`: the
            middle one of equal blocks again behind itself (arXiv 2409.19044 [note]); `lidas`: the
            middle layers again behind themselves (arXiv 2512.08819 [note]).
        moments: AdamW's moments are copied with the weights, or start at zero.
        alpha: phase i of k (from 1) lasts i ** alpha / (1 ** alpha + ... + k ** alpha) of the run,
            in place of every phase's `until` (PROP-alpha of arXiv 2409.19044 [note]; 0: equally).
        phases: the depths, one after the other; the last one is the model's and ends with the run.
        balance_groups: number of bands of layers, or their lengths: the depth is spread over them,
            so that every pipe stage has its share; without it the lowest layers are there.
    """

    name: Literal["stacking"]
    mode: Mode = "gradual"
    moments: Literal["copy", "fresh"] = "copy"
    alpha: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    phases: Annotated[list[StackingPhase], Field(min_length=2)]
    balance_groups: Groups | None = None

    @field_validator("mode", mode="before")
    @classmethod
    def _fresh_was_identity(cls, value: Any) -> Any:
        if value == "fresh":
            raise ValueError(
                "no mode any more: use `random` (new layers drawn as at the start, as in arXiv "
                "2511.04981), or `identity` (their output projections are zero, which `fresh` "
                "was). A run that began with `fresh` cannot go on: begin anew, in another run_dir"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _alpha_ends_phases(cls, section: dict[str, Any]) -> dict[str, Any]:
        alpha: Any = section.get("alpha")
        phases: Any = section.get("phases")
        able = type(alpha) in (int, float) and 0 <= alpha <= 10 and isinstance(phases, list)
        if not able or not all(isinstance(phase, dict) for phase in phases):
            return section  # without alpha, or with something wrong, which the fields will say
        for i, phase in enumerate(phases):
            if "until" in phase:
                raise ValueError(
                    f"phases[{i}].until={phase['until']} cannot take effect beside alpha={alpha}, "
                    f"which says where phases end; remove one of them"
                )
        ends = list(accumulate((i + 1) ** alpha for i in range(len(phases))))
        ended = [{**phase, "until": end / ends[-1]} for phase, end in zip(phases, ends)]
        return {**section, "phases": ended}


def sources(mode: Mode, before: int, after: int) -> list[int | None]:
    """For every layer of the grown model the layer that it is a copy of; None: a new layer.

    Raises:
        ValueError: the mode cannot grow `before` layers to `after`.
    """
    added = after - before
    if mode in COPIES_NOTHING:
        return [*range(before), *[None] * added]
    if before == 0:
        raise ValueError("there is no layer to copy: start with at least 1, or use mode random")
    if mode in ("double", "interleave"):
        if after % before:
            raise ValueError(f"every layer is copied alike: use a multiple of {before}")
        times = after // before
        return [i % before if mode == "double" else i // times for i in range(after)]
    if mode == "midas":
        return _with_middle_block_twice(before, added)
    if added > before:
        raise ValueError(f"{added} layers are copied of {before}: use at most {2 * before}")
    if mode == "gradual":
        return [*range(before), *range(before - added, before)]
    middle = (before - added) // 2
    return [*range(middle + added), *range(middle, before)]


def g_stack_tokens(parameters: float, flops: float) -> float:
    """Tokens that a model of a quarter of the depth reads before it is stacked four times.

    log10 d = .88 log10 N + 163.27 / log10 C - 5.74 (G_stack, arXiv 2405.15319 [note]).

    Args:
        parameters: N, of the full model.
        flops: C, of its dense training.
    """
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)


def _with_middle_block_twice(before: int, added: int) -> list[int | None]:
    """MIDAS: of the n blocks of `added` layers that the stack consists of, block ceil(n / 2)
    (counted from 1) stands twice."""
    if before % added:
        able = [before + b for b in range(1, before + 1) if before % b == 0]
        raise ValueError(
            f"one of equal blocks is copied, and {before} layers are no blocks of {added}; add a "
            f"divisor of {before}: use {', '.join(map(str, able))}"
        )
    num_blocks = before // added
    end = (num_blocks + 1) // 2 * added
    return [*range(end), *range(end - added, before)]


def _depth(layers: int | float, num_layers: int) -> int:
    return round(layers * num_layers) if isinstance(layers, float) else layers


class Stacking(Method):
    Settings = StackingSettings
    draws = False

    def __init__(self, settings: StackingSettings, *, seed, steps, shape) -> None:
        super().__init__(settings, seed=seed, steps=steps, shape=shape)
        self.depths = [_depth(p.layers, shape.num_layers) for p in settings.phases]
        names = [f"depth_{d}" for d in self.depths]
        try:
            self.phases = method_phases(settings.phases, names, steps)
        except UserError:
            if settings.alpha is None:
                raise
            raise UserError(
                f"method.alpha={settings.alpha:g} gives a phase no step of steps={steps}; lower "
                f"it, or raise steps."
            ) from None
        self._check(settings)
        lengths: tuple[int, ...] = (shape.num_layers,)
        if settings.balance_groups is not None:
            lengths = balance.band_lengths(settings.balance_groups, shape.num_layers)
            self.band_lengths = lengths
        self.places = [self._places(depth, lengths) for depth in self.depths]

    def _check(self, settings: StackingSettings) -> None:
        if len(set(self.shape.layers)) > 1:
            raise UserError(
                f"method.name='stacking' copies layers, and those of model_type "
                f"{self.shape.family!r} are not all of one shape; use another method or family."
            )
        if self.depths[-1] != self.shape.num_layers:
            raise UserError(
                f"method.phases[{len(self.depths) - 1}].layers={settings.phases[-1].layers}: the "
                f"last phase trains the whole model; use {self.shape.num_layers} or 1.0."
            )
        first = settings.phases[0].layers
        if isinstance(first, float) and self.depths[0] == 0:
            raise UserError(
                f"method.phases[0].layers={first} keeps none of {self.shape.num_layers} layers "
                f"(counts are rounded); use at least {1 / self.shape.num_layers:.3g}, or with mode "
                f"random or identity 0."
            )
        if settings.mode in COPIES_NOTHING and settings.moments == "fresh":
            raise UserError(
                f"method.moments=fresh cannot take effect with method.mode={settings.mode}: new "
                f"layers always start with zero moments; remove it."
            )
        for i, (before, after) in enumerate(pairwise(self.depths), start=1):
            given = settings.phases[i].layers
            depth = f"layers={given}" + f" ({after} layers)" * isinstance(given, float)
            if after <= before:
                raise UserError(
                    f"method.phases[{i}].{depth} is not above {before}, the depth of the phase "
                    f"before; the depth must grow."
                )
            try:
                sources(settings.mode, before, after)
            except ValueError as e:
                raise UserError(
                    f"method.phases[{i}].{depth} after {before} with method.mode="
                    f"{settings.mode}: {e}."
                ) from None

    @property
    def follows_g_stack(self) -> bool:
        """Whether a quarter of the layers is stacked four times, at once."""
        few = self.shape.num_layers / 4
        return self.settings.mode == "double" and self.depths == [few, self.shape.num_layers]

    @staticmethod
    def _places(depth: int, lengths: tuple[int, ...]) -> list[int]:
        """Places of the layers that exist: the first of every band, bands in proportion."""
        counts = balance.spread(depth, lengths, (0,) * len(lengths), step=0)
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        return [start + i for start, n in zip(starts, counts) for i in range(n)]

    def plan(self, step: int, micro_batch: int = 0) -> Plan:
        phase = self.phase_at(step)
        layers: list[LayerPlan | None] = [None] * self.shape.num_layers
        for i in self.places[phase]:
            layers[i] = LayerPlan(tuple(Kept(None, part.units) for part in self.shape.layers[i]))
        return Plan(step, phase, tuple(layers))

    def loads(self, step: int) -> tuple[Load, ...]:
        places = self.places[self.phase_at(step)]
        return tuple(
            Load(float(i in places), load.units, load.key_value_groups)
            for i, load in enumerate(full_loads(self.shape))
        )

    def growth(self, step: int) -> Growth | None:
        phase = self.phase_at(step)
        if phase == 0 or step != self.phases[phase].from_step:
            return None
        before, after = self.places[phase - 1], self.places[phase]
        taken = sources(self.settings.mode, len(before), len(after))
        pairs = [(place, None if s is None else before[s]) for place, s in zip(after, taken)]
        # The first layer with a source is that layer itself, whether it moves or not.
        anew: frozenset[int] = frozenset()
        if self.settings.moments == "fresh":
            anew = frozenset(place for i, place in enumerate(after) if taken[i] in taken[:i])
        return Growth(
            copies={p: s for p, s in pairs if s is not None and (s != p or p in anew)},
            new=tuple(place for place, source in pairs if source is None),
            new_are_identity=self.settings.mode == "identity",
            without_moments=anew,
        )

    def whole(self, step: int) -> Plan | None:
        plan = self.plan(step)
        return None if plan.is_full else plan
