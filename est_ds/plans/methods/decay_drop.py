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


class DecayDropSettings(RateSettings):
    """`p_max`: the chance that the last layer is dropped at the first step."""

    name: Literal["decay_drop"]
    p_max: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
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

    def rates(self, steps: np.ndarray) -> np.ndarray:
        depth = np.arange(self.shape.num_layers) / (self.shape.num_layers - 1)
        fade = 1.0 - steps / max(1, self.steps - 1)
        return 1.0 - self.settings.p_max * depth * fade[:, None]
