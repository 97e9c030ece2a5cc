"""`decay_drop`: dropping that grows with depth and fades over the run (arXiv 2609.05275).

Layer l of L (from 0) is dropped at step t of T (from 0) with chance
p_max * l / (L - 1) * (1 - t / (T - 1)); the output of a kept layer is divided by its chance to be
kept. This is the variant that draws once a step, for all tokens alike.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from est_ds.errors import UserError
from est_ds.plans.methods.base import Scale
from est_ds.plans.methods.rates import KeepRates, RateSettings
from est_ds.plans.shape import ModelShape

LARGEST_FACTOR = 20.0


class DecayDropSettings(RateSettings):
    """Settings of the dropping.

    Attributes:
        p_max: the chance that the last layer is dropped at the first step. The paper has .2 up to
            0.9 B parameters, .6 at 1.8 B and .8 at 3.9 B [note]; its .99 at 8.2 B scales a layer
            that is kept by up to 100, which one draw for a whole batch does not stand.
    """

    name: Literal["decay_drop"]
    p_max: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    scale: Scale = Scale(layers="inverse")


class DecayDrop(KeepRates):
    Settings = DecayDropSettings

    def __init__(self, settings: Any, *, seed: int, steps: int, shape: ModelShape) -> None:
        if shape.num_layers < 2:
            raise UserError(
                "method.name='decay_drop' never drops the first layer, and the model has no other; "
                "use a model of 2 layers or more, or method.name=full."
            )
        super().__init__(settings, seed=seed, steps=steps, shape=shape)
        self._check_factors()

    def _check_factors(self) -> None:
        """Refuses factors above `LARGEST_FACTOR`: they scale the outputs of a layer, and with them
        its gradient, of all sequences of a step at once."""
        if self._largest_factors(np.array([0]))[0] <= LARGEST_FACTOR:
            return  # the first step has the largest
        factors = self._largest_factors(np.arange(self.steps))
        most, other = 1 - 1 / LARGEST_FACTOR, "method.scale={layers: sqrt} or none"
        if self.settings.scale.layers == "sqrt":
            most, other = 1 - 1 / LARGEST_FACTOR**2, "method.scale={layers: none}"
        raise UserError(
            f"method.p_max={self.settings.p_max}: a kept layer would be scaled by more than "
            f"{LARGEST_FACTOR:g} in {sum(f > LARGEST_FACTOR for f in factors)} of {self.steps} "
            f"steps, by up to {factors[0]:.3g}; use at most {most:g}, or {other}."
        )

    def _largest_factors(self, steps: np.ndarray) -> list[float]:
        """The factor of the layer that is scaled most, at every step."""
        chances = self._draw.bernoulli_probabilities(self._keep(steps))
        return self.settings.scale.factors(chances.min(axis=1))

    def rates(self, steps: np.ndarray) -> np.ndarray:
        depth = np.arange(self.shape.num_layers) / (self.shape.num_layers - 1)
        fade = 1.0 - steps / max(1, self.steps - 1)
        return 1.0 - self.settings.p_max * depth * fade[:, None]
