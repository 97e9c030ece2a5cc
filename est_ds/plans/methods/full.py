"""`full`: everything at every step, the dense baseline."""

from __future__ import annotations

from typing import Literal

from est_ds.config.strict import Strict
from est_ds.plans.methods.base import Load, Method, full_loads
from est_ds.plans.phases import Phase
from est_ds.plans.plan import Plan, full_plan


class FullSettings(Strict):
    name: Literal["full"]


class Full(Method):
    Settings = FullSettings

    def __init__(self, settings, *, seed, steps, shape) -> None:
        super().__init__(settings, seed=seed, steps=steps, shape=shape)
        self.phases = (Phase("full", 0, steps),)

    def plan(self, step: int) -> Plan:
        return full_plan(step, 0, [tuple(p.units for p in layer) for layer in self.shape.layers])

    def loads(self, step: int) -> tuple[Load, ...]:
        return full_loads(self.shape)
