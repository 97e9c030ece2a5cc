"""Next-token prediction: every token of a window but the first is a target."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from est_ds.data.objectives.base import Draws, Example, Objective, Settings, Surroundings


class Causal(Objective):
    """Windows of `sequence` + 1 tokens that overlap by one."""

    identity = ""

    def __init__(self, sequence: int) -> None:
        self.sequence = self.stride = sequence
        self.window = sequence + 1

    def num_targets(self, draws: Draws) -> int:
        return self.sequence

    def example(self, tokens: np.ndarray, draws: Draws) -> Example:
        return Example((tokens[:-1],), tokens[1:])

    def crossing(self, starts: np.ndarray) -> np.ndarray:
        return starts - 1


class CausalSettings(Settings):
    """It has no settings."""

    heads: ClassVar[tuple[str, ...]] = ("AutoModelForCausalLM",)
    separable: ClassVar[bool] = True

    name: Literal["causal"] = "causal"

    def build(self, surroundings: Surroundings) -> Causal:
        return Causal(surroundings.sequence)
