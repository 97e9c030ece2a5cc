"""`pld`: Progressive Layer Dropping (arXiv 2010.13369).

theta(t) = (1 - theta_bar) exp(-gamma t) + theta_bar falls from 1 to theta_bar over the run, and
layer i of L is kept with chance 1 - (i / L) (1 - theta(t)), so that deeper layers are dropped more
often (section 4.2). The output of a kept layer is divided by its chance.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from est_ds.plans.methods.base import Scale
from est_ds.plans.methods.rates import KeepRates, RateSettings


class PldSettings(RateSettings):
    """The paper's settings for BERT are the defaults.

    Attributes:
        theta_bar: what theta falls to.
        gamma: per step (default: 100 / steps of the run, the paper's heuristic; theta is then near
            theta_bar after a twentieth of the run, and a short run saves what a long one does).
        count_from: the number i of the first layer. 1: the last layer is kept with chance theta.
            0: the first layer is never dropped, and fewer are on average.
    """

    name: Literal["pld"]
    theta_bar: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    gamma: Annotated[float, Field(gt=0.0)] | None = None
    count_from: Annotated[int, Field(ge=0, le=1)] = 1
    scale: Scale = Scale(layers="inverse")


class Pld(KeepRates):
    Settings = PldSettings

    def theta(self, steps: np.ndarray) -> np.ndarray:
        """theta(t), rounded, so that processors whose exp differs in the last bit agree."""
        bar, gamma = self.settings.theta_bar, self.settings.gamma or 100 / self.steps
        return np.round((1 - bar) * np.exp(-gamma * steps) + bar, 12)

    def rates(self, steps: np.ndarray) -> np.ndarray:
        num_layers = self.shape.num_layers
        depth = (np.arange(num_layers) + self.settings.count_from) / num_layers
        return 1.0 - depth * (1.0 - self.theta(steps)[:, None])
