"""`static`: one fixed random subnetwork, then the full model.

The control for methods that draw a new subnetwork at every step: the same cost, no evolution.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from est_ds.errors import UserError
from est_ds.plans.methods.base import Load, plan_loads
from est_ds.plans.methods.subsets import Amount, Fraction, PhasedSubsets, PhaseSize, SubsetSettings
from est_ds.plans.phases import Phase, to_step


class StaticSettings(SubsetSettings):
    """The subnetwork, and how long it is trained.

    Attributes:
        until: where the full model starts (a step, or a fraction of the run).
        layers: their number (whole), or a fraction of them (with a point).
        heads: fraction of the query heads of every kept layer.
        columns: fraction of the MLP's columns of every kept layer.
    """

    name: Literal["static"]
    until: int | float
    layers: Amount = 1.0
    heads: Fraction = 1.0
    columns: Fraction = 1.0


class Static(PhasedSubsets):
    Settings = StaticSettings
    draws = False

    def _phases(self, settings: StaticSettings, steps: int) -> tuple[Phase, ...]:
        end = to_step(settings.until, steps, "method.until")
        if not 0 < end < steps:
            raise UserError(
                f"method.until={settings.until} is step {end} of steps={steps}: the full model "
                f"must have steps of its own; use 1 to {steps - 1}, or a fraction below 1."
            )
        return Phase("static", 0, end), Phase("full", end, steps)

    def _sizes(self, settings: StaticSettings) -> list[PhaseSize]:
        drawn = PhaseSize("method.", settings.layers, settings.heads, settings.columns)
        return [drawn, PhaseSize("method.", 1.0, 1.0, 1.0)]

    def _refuse_settings_without_effect(self) -> None:
        super()._refuse_settings_without_effect()
        settings = self.settings
        if settings.layers == settings.heads == settings.columns == 1.0:
            raise UserError(
                "method.name='static' cannot take effect: its layers, heads and columns are all "
                "1.0; set one to a fraction below 1, or use method.name=full."
            )

    def _address(self, step: int) -> int:
        return 0

    def loads(self, step: int) -> tuple[Load, ...]:
        """Those of the one subnetwork, which need not be the average over draws."""
        return self._static_loads if self.phase_at(step) == 0 else super().loads(step)

    @cached_property
    def _static_loads(self) -> tuple[Load, ...]:
        return plan_loads(self.plan(0), self.shape)
