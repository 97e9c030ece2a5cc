"""`raptr`: Random Part Training (arXiv 2402.05913).

In phase k every step trains a random path of n_k layers, which holds the first and the last one
always, and n_k grows to the full depth (section 3, algorithm 1). In the width variant a phase keeps
a fraction of the heads and of the MLP columns instead.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from est_ds.plans.methods.subsets import Amount, Fraction, PhasedSubsets, SubsetSettings
from est_ds.plans.phases import PhaseSettings


class RaptrPhase(PhaseSettings):
    """One phase and what it keeps.

    Attributes:
        layers: their number (whole), or a fraction of them (with a point).
        heads: fraction of the query heads of every kept layer.
        columns: fraction of the MLP's columns of every kept layer.
        always_keep: in place of the method's list, in this phase.
    """

    layers: Amount = 1.0
    heads: Fraction = 1.0
    columns: Fraction = 1.0
    always_keep: list[int] | None = None


class RaptrSettings(SubsetSettings):
    """Phases of paths.

    Attributes:
        phases: what is kept, phase after phase; the last one ends with the run.
    """

    name: Literal["raptr"]
    phases: Annotated[list[RaptrPhase], Field(min_length=1)]
    always_keep: list[int] = [0, -1]


class Raptr(PhasedSubsets):
    Settings = RaptrSettings
