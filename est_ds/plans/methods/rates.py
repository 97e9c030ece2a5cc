"""What `layer_drop`, `pld` and `decay_drop` share: every layer kept on its own with its chance."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from est_ds.errors import UserError
from est_ds.plans.draw import Address
from est_ds.plans.layers import (
    LayerDraw,
    Skip,
    assemble,
    check_skip,
    draw_kinds,
    resolve_layers,
)
from est_ds.plans.methods.base import Groups, Load, Method, MethodSettings, Scale, full_loads
from est_ds.plans.phases import Phase
from est_ds.plans.plan import Kept, Plan
from est_ds.plans.shape import ModelShape

STEPS_AT_ONCE = 2**16


class RateSettings(MethodSettings):
    """What a method of rates can set besides its rates.

    Attributes:
        skip: whole layers, or attention and MLP of a layer apart (each with the layer's chance).
        always_keep: layers that are never skipped; -1 is the last.
        balance_groups: number of bands of layers, or their lengths; a band of which a draw keeps
            nothing keeps one layer. Without it a step may train embeddings and head alone.
        scale: factors on the outputs of the layers that are kept.
    """

    skip: Skip = "layer"
    always_keep: list[int] = []
    balance_groups: Groups | None = None
    scale: Scale = Scale()


class KeepRates(Method):
    """A method that keeps layer i at step t with a chance of its own."""

    Settings: ClassVar[type[RateSettings]]

    def __init__(self, settings: Any, *, seed: int, steps: int, shape: ModelShape) -> None:
        super().__init__(settings, seed=seed, steps=steps, shape=shape)
        check_skip(settings.skip, shape)
        self.phases = (Phase(settings.name, 0, steps),)
        self._always = sorted(
            resolve_layers(settings.always_keep, shape.num_layers, "method.always_keep")
        )
        if len(self._always) == shape.num_layers:
            raise UserError(
                f"method.always_keep={settings.always_keep} names all {shape.num_layers} layers, "
                f"so that method.name={settings.name!r} cannot take effect; shorten the list, or "
                f"use method.name=full."
            )
        self._draw = LayerDraw(shape.num_layers, settings.balance_groups, self._always)
        if settings.balance_groups is not None:
            self.band_lengths = self._draw.lengths

    @abstractmethod
    def rates(self, steps: np.ndarray) -> np.ndarray:
        """Chances to keep every layer at `steps` [S], float64 [S, num_layers]."""

    def _keep(self, steps: np.ndarray) -> np.ndarray:
        keep = self.rates(steps)
        keep[:, self._always] = 1.0
        return keep

    def plan(self, step: int, micro_batch: int = 0) -> Plan:
        phase = self.phase_at(step)
        keep = self._keep(np.array([step]))[0]
        kinds = draw_kinds(self.settings.skip, self.shape)
        address = Address(self.seed, step, micro_batch)
        kept = [set(self._draw.bernoulli(address, kind, keep)) for kind in kinds]
        factors = self.settings.scale.factors(self._draw.bernoulli_probabilities(keep))

        def whole_part(i: int, p: int) -> Kept:
            return Kept(None, self.shape.layers[i][p].units)

        return Plan(step, phase, assemble(self.shape, kept, factors, whole_part))

    def loads(self, step: int) -> tuple[Load, ...]:
        return self._loads(self._draw.bernoulli_probabilities(self._keep(np.array([step])))[0])

    def mean_loads(self, phase: int) -> tuple[Load, ...]:
        return self._loads(self.mean_chances)

    @cached_property
    def mean_chances(self) -> np.ndarray:
        """Chance of every layer to be kept, averaged over all steps of the run."""
        total = np.zeros(self.shape.num_layers)
        for start in range(0, self.steps, STEPS_AT_ONCE):
            steps = np.arange(start, min(start + STEPS_AT_ONCE, self.steps))
            total += self._draw.bernoulli_probabilities(self._keep(steps)).sum(axis=0)
        return total / self.steps

    def _loads(self, chances: np.ndarray) -> tuple[Load, ...]:
        # Costs are linear in the chance, also where attention and MLP are skipped apart.
        return tuple(
            Load(chance, load.units, load.key_value_groups)
            for chance, load in zip(chances.tolist(), full_loads(self.shape))
        )
