"""`full`: everything at every step, the dense baseline."""

from __future__ import annotations

from typing import Literal

from est_ds.errors import UserError
from est_ds.plans.methods.base import Load, Method, MethodSettings, full_loads
from est_ds.plans.phases import Phase
from est_ds.plans.plan import Plan, full_plan


class FullSettings(MethodSettings):
    """It has no settings of its own."""

    name: Literal["full"]


class Full(Method):
    Settings = FullSettings
    draws = False

    def __init__(self, settings, *, seed, steps, shape) -> None:
        super().__init__(settings, seed=seed, steps=steps, shape=shape)
        if self.masked:
            raise UserError(
                "method.compute=masked cannot take effect with method.name='full', which leaves "
                "nothing out; remove it."
            )
        self.phases = (Phase("full", 0, steps),)

    def plan(self, step: int, micro_batch: int = 0) -> Plan:
        return full_plan(step, 0, [tuple(p.units for p in layer) for layer in self.shape.layers])

    def loads(self, step: int) -> tuple[Load, ...]:
        return full_loads(self.shape)
