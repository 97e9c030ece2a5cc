"""`token_drop`: random-LTD (random layerwise token dropping, arXiv 2211.11586).

In the middle layers a random subset of the positions of every sequence passes through the layer;
the others skip it, and come back behind it at their places. Kept positions stay in order with their
own rotary angles or position embeddings, and attend among themselves only. Every layer draws anew.
How many it keeps grows linearly from step to step until all do, and the full model trains.

The authors' code (DeepSpeed's `random_ltd`) draws a subset for every sequence. Here the sequences
of a plan share theirs: all of a step, or with `draw: micro_batch` those of a micro-batch, which is
a sequence where `batch.micro` is 1. The paper's learning rate by consumed layer-tokens [note] is
not part of the method.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from est_ds.errors import UserError
from est_ds.plans import draw
from est_ds.plans.layers import resolve_layers
from est_ds.plans.methods.base import Load, Method, MethodSettings, full_loads
from est_ds.plans.phases import Phase, to_step
from est_ds.plans.plan import Kept, LayerPlan, Plan
from est_ds.plans.shape import ModelShape
from est_ds.plans.units import exact_count


class TokenDropSettings(MethodSettings):
    """Which layers drop positions, and how many.

    Attributes:
        start: fraction of the positions that a step keeps at first.
        until: where all positions are kept, and the full model starts (a step, or a fraction of
            the run).
        layers: the first and the last layer that drop positions; negative ones count from the end.
    """

    name: Literal["token_drop"]
    start: Annotated[float, Field(gt=0.0, lt=1.0)]
    until: int | float
    layers: Annotated[list[int], Field(min_length=2, max_length=2)] = [1, -2]


class TokenDrop(Method):
    """Positions skip the middle layers.

    Attributes:
        dropping: the layers that positions skip.
    """

    Settings = TokenDropSettings

    def __init__(
        self, settings: TokenDropSettings, *, seed: int, steps: int, shape: ModelShape
    ) -> None:
        super().__init__(settings, seed=seed, steps=steps, shape=shape)
        if shape.encoder_layers:
            raise UserError(
                f"method.name='token_drop' does not work with model.model_type={shape.family!r}: "
                f"its layers share a bias between all positions; use a model without an encoder "
                f"and a decoder, or another method."
            )
        if self.masked:
            raise UserError(
                "method.compute=masked does not work with method.name='token_drop': nothing may "
                "attend to a position that skips the layer, and multiplying its output by zero "
                "does not prevent that; use method.compute=sliced."
            )
        assert shape.sequence is not None  # of the run
        self.sequence: int = shape.sequence
        self.dropping = _dropping(settings.layers, shape.num_layers)
        self._first = exact_count(settings.start, self.sequence)
        if self._first == self.sequence:
            raise UserError(
                f"method.start={settings.start} keeps all {self.sequence} positions of a sequence "
                f"(counts are rounded), so it cannot take effect; use at most "
                f"{(self.sequence - 1) / self.sequence:.3g}."
            )
        end = to_step(settings.until, steps, "method.until")
        if not 0 < end <= steps:
            raise UserError(
                f"method.until={settings.until} is step {end} of steps={steps}; use 1 to {steps}, "
                f"or a fraction of the run."
            )
        phases = Phase("token_drop", 0, end), Phase("full", end, steps)
        self.phases = phases[: 2 if end < steps else 1]

    def kept(self, step: Any) -> Any:
        """How many positions pass through a layer that drops some, at a step before `until`, or
        at each of several [S]."""
        growing = self.sequence - self._first
        return self._first + growing * step // self.phases[0].until_step

    def plan(self, step: int, micro_batch: int = 0) -> Plan:
        phase = self.phase_at(step)
        address = draw.Address(self.seed, step, micro_batch)
        layers = []
        for i, parts in enumerate(self.shape.layers):
            positions = None
            if phase == 0 and i in self.dropping:
                keys = address.keys(draw.POSITIONS, i, self.sequence)
                positions = draw.smallest(keys, self.kept(step))
            whole = tuple(Kept(None, part.units) for part in parts)
            layers.append(LayerPlan(whole, positions=positions))
        return Plan(step, phase, tuple(layers))

    def loads(self, step: int) -> tuple[Load, ...]:
        return self._loads(np.array([step])) if self.phase_at(step) == 0 else self._full_loads

    def mean_loads(self, phase: int) -> tuple[Load, ...]:
        return self._growing_loads if phase == 0 else self._full_loads

    @cached_property
    def _growing_loads(self) -> tuple[Load, ...]:
        return self._loads(np.arange(self.phases[0].until_step))

    @cached_property
    def _full_loads(self) -> tuple[Load, ...]:
        return full_loads(self.shape)

    def _loads(self, steps: np.ndarray) -> tuple[Load, ...]:
        """Averages over steps [S] of the first phase."""
        shares = self.kept(steps) / self.sequence
        mean, squared = float(shares.mean()), float((shares**2).mean())
        return tuple(
            Load(1.0, load.units, load.key_value_groups, mean, squared)
            if i in self.dropping
            else load
            for i, load in enumerate(self._full_loads)
        )


def _dropping(bounds: list[int], num_layers: int) -> range:
    """The layers that drop positions.

    Raises:
        UserError: there is none.
    """
    if num_layers < 3 and bounds == TokenDropSettings.model_fields["layers"].default:
        raise UserError(
            f"method.name='token_drop' drops positions in all layers but the first and the last, "
            f"and the model has {num_layers}; set method.layers, or use another method."
        )
    first, last = (min(resolve_layers([i], num_layers, "method.layers")) for i in bounds)
    if first > last:
        raise UserError(
            f"method.layers={bounds} is layers {first} to {last}: the first comes after the last; "
            f"swap them."
        )
    return range(first, last + 1)
