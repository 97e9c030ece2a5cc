"""The plan of one optimizer step, or of one of its micro-batches, a pure value."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of one part (an attention or an MLP) of a layer.

    Attributes:
        units: kept query heads or MLP columns, sorted int64 [k]; None keeps all. With none of
            them (k = 0) the part is skipped: it contributes nothing to the residual stream.
        total: number of units that the part has, n.
        key_value_groups: kept key/value heads, sorted int64; None keeps all.
    """

    units: np.ndarray | None
    total: int
    key_value_groups: np.ndarray | None = None

    @property
    def count(self) -> int:
        return self.total if self.units is None else len(self.units)

    @property
    def scale(self) -> float:
        """Realised n / k, by which the part's output is multiplied (EST, section 3).

        0 for a skipped part, whose output is nothing.
        """
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """A kept layer: what is kept of its parts, and the factor on their outputs.

    Attributes:
        positions: the positions of every sequence that pass through the layer, sorted int64 [k];
            the others skip it. None: all do.
    """

    parts: tuple[Kept, ...]
    scale: float = 1.0
    positions: np.ndarray | None = None


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
        return all(layer is not None and _is_whole(layer) for layer in self.layers)

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
                for indices in (kept.units, kept.key_value_groups):
                    h.update(b";all" if indices is None else _packed(indices, kept.total))
            if layer.positions is not None:
                h.update(b";at" + _packed(layer.positions, 2**32))
        return h.hexdigest()


class StepPlans:
    """The plans of one optimizer step: one for all its micro-batches, or one for each.

    Each is drawn when it is first asked for.

    Args:
        step: optimizer step, from 0.
        count: 1, or the micro-batches of the global batch.
        draw: the plan of a micro-batch, by its index in the global batch.
    """

    def __init__(self, step: int, count: int, draw: Callable[[int], Plan]) -> None:
        self.step, self._draw = step, draw
        self._drawn: list[Plan | None] = [None] * count

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, micro_batch: int) -> Plan:
        plan = self._drawn[micro_batch]
        if plan is None:
            plan = self._drawn[micro_batch] = self._draw(micro_batch)
        return plan

    def __iter__(self) -> Iterator[Plan]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def digest(self) -> str:
        """That of the one plan, or 16 hexadecimal characters over those of all."""
        if len(self) == 1:
            return self[0].digest
        digests = "|".join(plan.digest for plan in self)
        return hashlib.blake2b(digests.encode(), digest_size=8).hexdigest()


def _is_whole(layer: LayerPlan) -> bool:
    everything = layer.positions is None and all(kept.units is None for kept in layer.parts)
    return everything and layer.scale == 1.0


def _packed(indices: np.ndarray, total: int) -> bytes:
    """Indices below `total` in few bytes: hashing them is a fair part of a plan's cost."""
    return b";%d:" % len(indices) + indices.astype("<u2" if total <= 2**16 else "<u4").tobytes()


def full_plan(step: int, phase: int, parts_per_layer: list[tuple[int, ...]]) -> Plan:
    """The plan that keeps everything.

    Args:
        parts_per_layer: number of units of every part of every layer.
    """
    layers = tuple(
        LayerPlan(tuple(Kept(None, total) for total in parts)) for parts in parts_per_layer
    )
    return Plan(step, phase, layers)
