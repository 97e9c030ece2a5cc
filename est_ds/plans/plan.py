"""The plan of one optimizer step, a pure value."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of one part (an attention or an MLP) of a layer.

    Attributes:
        units: kept query heads or MLP columns, sorted int64 [k]; None keeps all.
        total: number of units that the part has, n.
        groups: kept key/value heads, sorted int64; None keeps all.
    """

    units: np.ndarray | None
    total: int
    groups: np.ndarray | None = None

    @property
    def count(self) -> int:
        return self.total if self.units is None else len(self.units)

    @property
    def scale(self) -> float:
        """Realised n / k, by which the part's output is multiplied (EST, section 3)."""
        return self.total / self.count


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """A kept layer: what is kept of its parts, and the factor on their outputs."""

    parts: tuple[Kept, ...]
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Plan:
    """Layers, heads and columns that train at `step`; a layer that is None is skipped.

    Attributes:
        step: optimizer step, from 0.
        phase: index of the phase in the schedule.
        layers: one entry for every layer of the model.
    """

    step: int
    phase: int
    layers: tuple[LayerPlan | None, ...]

    @property
    def kept_layers(self) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer is not None)

    @property
    def is_full(self) -> bool:
        return all(
            layer is not None and layer.scale == 1.0 and all(k.units is None for k in layer.parts)
            for layer in self.layers
        )

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal characters over the step and everything kept."""
        h = hashlib.blake2b(f"{self.step}".encode(), digest_size=8)
        for layer in self.layers:
            if layer is None:
                h.update(b"|skipped")
                continue
            h.update(f"|{layer.scale!r}".encode())
            for kept in layer.parts:
                for indices in (kept.units, kept.groups):
                    h.update(b";all" if indices is None else b";" + indices.astype("<i8").tobytes())
        return h.hexdigest()


def full_plan(step: int, phase: int, parts_per_layer: list[tuple[int, ...]]) -> Plan:
    """The plan that keeps everything.

    Args:
        parts_per_layer: number of units of every part of every layer.
    """
    layers = tuple(
        LayerPlan(tuple(Kept(None, total) for total in parts)) for parts in parts_per_layer
    )
    return Plan(step, phase, layers)
