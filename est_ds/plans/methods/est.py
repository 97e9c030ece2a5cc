"""`est`: Evolving Subnetwork Training (arXiv 2406.06962).

In every phase each step trains a uniform random subnetwork of fixed size: a fraction of the
layers, and in every kept layer a fraction of the query heads and of the MLP columns (section 3).
A dimension that stays at 1.0 is not sampled, so any of the three alone, or any pair, is a setting.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from est_ds.plans.methods.subsets import Fraction, PhasedSubsets, SubsetSettings
from est_ds.plans.phases import PhaseSettings


class EstPhase(PhaseSettings):
    """One phase and what it keeps.

    Attributes:
        layers: fraction of the layers.
        heads: fraction of the query heads of every kept layer.
        columns: fraction of the MLP's columns of every kept layer.
        always_keep: in place of the method's list, in this phase.
    """

    layers: Fraction = 1.0
    heads: Fraction = 1.0
    columns: Fraction = 1.0
    always_keep: list[int] | None = None


class EstSettings(SubsetSettings):
    """Phases of subnetworks.

    Attributes:
        phases: what is kept, phase after phase; the last one ends with the run.
    """

    name: Literal["est"]
    phases: Annotated[list[EstPhase], Field(min_length=1)]


class Est(PhasedSubsets):
    Settings = EstSettings
