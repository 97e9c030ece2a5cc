"""`layer_drop`: every layer is dropped with the same chance at every step (arXiv 1909.11556).

LayerDrop (section 3.2) does not rescale the layers that are kept; `scale.layers: inverse` does.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from est_ds.plans.methods.rates import KeepRates, RateSettings


class LayerDropSettings(RateSettings):
    """How often layers are dropped.

    Attributes:
        drop: the chance that a layer is dropped; the paper recommends 0.2.
    """

    name: Literal["layer_drop"]
    drop: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2


class LayerDrop(KeepRates):
    Settings = LayerDropSettings

    def rates(self, steps: np.ndarray) -> np.ndarray:
        return np.full((len(steps), self.shape.num_layers), 1.0 - self.settings.drop)
