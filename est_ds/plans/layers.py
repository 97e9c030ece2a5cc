"""Which layers are kept: exact counts or Bernoulli draws, over bands of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np

from est_ds.errors import UserError
from est_ds.plans import balance, draw
from est_ds.plans.plan import Kept, LayerPlan
from est_ds.plans.shape import ModelShape
from est_ds.plans.units import skipped_part

Skip = Literal["layer", "sublayer"]


class LayerDraw:
    """Draws kept layers, spread over bands when they are balanced.

    A kind of draw other than `draw.LAYERS` draws the layers whose part p is kept, when attention
    and MLP are skipped apart; all that is said of layers then holds of each kind of part.

    Attributes:
        lengths: layers of every band; one band of all layers without `balance_groups`.
        always: layers that are always kept.
        floors: the least that an exact count keeps in every band.
    """

    def __init__(
        self, num_layers: int, balance_groups: int | list[int] | None, always_keep: Iterable[int]
    ) -> None:
        self.num_layers = num_layers
        self.balanced = balance_groups is not None
        self.lengths: tuple[int, ...] = (num_layers,)
        if balance_groups is not None:
            self.lengths = balance.band_lengths(balance_groups, num_layers)
        self.always = frozenset(always_keep)
        ends = np.cumsum(self.lengths).tolist()
        self._bands = [range(end - n, end) for end, n in zip(ends, self.lengths)]
        self._free = [[i for i in band if i not in self.always] for band in self._bands]
        self._fixed = [[i for i in band if i in self.always] for band in self._bands]
        self.floors = tuple(max(1, len(fixed)) for fixed in self._fixed)

    def exact(self, address: draw.Address, kind: int, count: int) -> list[int]:
        """`count` layers: in every band its always-kept ones and a uniform subset of the others.

        How many a band keeps depends on the step alone.
        """
        if count == self.num_layers:
            return list(range(count))
        kept: list[int] = []
        for r, n in enumerate(balance.spread(count, self.lengths, self.floors, address.step)):
            fixed, free = self._fixed[r], self._free[r]
            keys = address.keys(kind, r, len(free))
            kept += fixed + [free[i] for i in draw.smallest(keys, n - len(fixed))]
        return sorted(kept)

    def exact_probabilities(self, count: int) -> np.ndarray:
        """Chance of every layer to be among `count` kept ones, float64 [num_layers].

        Exact over the steps in which the remainder of the spread rotates once.
        """
        means = np.mean(
            [balance.spread(count, self.lengths, self.floors, s) for s in range(self.num_layers)],
            axis=0,
        )
        chances = np.ones(self.num_layers)
        for mean, fixed, free in zip(means, self._fixed, self._free):
            if free:
                chances[free] = (mean - len(fixed)) / len(free)
        return chances

    def bernoulli(self, address: draw.Address, kind: int, keep: np.ndarray) -> list[int]:
        """Every layer on its own with its chance in `keep` [num_layers].

        A draw may keep no layer at all: the step then trains embeddings and head only, as the
        papers' draws do. With balanced bands, a band of which nothing is kept keeps one of its
        layers, drawn uniformly.
        """
        n = self.num_layers
        keys = address.keys(kind, 0, n + len(self._bands))
        kept = draw.below(keys[:n], keep)
        if self.balanced:
            for key, band in zip(keys[n:].tolist(), self._bands):
                if not kept[band.start : band.stop].any():
                    kept[band.start + key * len(band) // 2**32] = True
        return np.flatnonzero(kept).tolist()

    def bernoulli_probabilities(self, keep: np.ndarray) -> np.ndarray:
        """Chance of every layer to be kept by `bernoulli`; any leading axes, layers last."""
        if not self.balanced:
            return keep
        chances = keep.copy()
        for band in self._bands:
            part = keep[..., band.start : band.stop]
            none_kept = np.prod(1 - part, axis=-1, keepdims=True)
            chances[..., band.start : band.stop] += none_kept / len(band)
        return chances


def resolve_layers(listed: Iterable[int], num_layers: int, field: str) -> frozenset[int]:
    """Layer numbers, of which negative ones count from the end.

    Raises:
        UserError: a number that no layer has.
    """
    listed = list(listed)
    for i in listed:
        if not -num_layers <= i < num_layers:
            raise UserError(
                f"{field} holds {i}: the model has {num_layers} layers; use "
                f"{-num_layers} to {num_layers - 1}."
            )
    return frozenset(i % num_layers for i in listed)


def draw_kinds(skip: Skip, shape: ModelShape) -> list[int]:
    """Kinds of draws of layers: one for whole layers, or one for every part of them."""
    if skip == "layer":
        return [draw.LAYERS]
    return [draw.SUBLAYERS + p for p in range(max(map(len, shape.layers)))]


def check_skip(skip: Skip, shape: ModelShape) -> None:
    """Checks that parts can be skipped apart where `method.skip` says so.

    Raises:
        UserError: a layer has one part only.
    """
    if skip == "sublayer" and shape.has_state_space:
        raise UserError(
            f"method.skip=sublayer cannot take effect with model.model_type={shape.family!r}: its "
            f"layers have one part each; remove it."
        )


def assemble(
    shape: ModelShape,
    kept: list[set[int]],
    factors: list[float],
    draw_part: Callable[[int, int], Kept],
) -> tuple[LayerPlan | None, ...]:
    """The plan's layers from the drawn sets of layers.

    Args:
        kept: kept layers, one set for whole layers or one for every part.
        factors: the scale of every layer.
        draw_part: what is kept of part p of layer i, called with (i, p).
    """
    layers: list[LayerPlan | None] = [None] * shape.num_layers
    for i, parts in enumerate(shape.layers):
        in_layer = [i in kept[p if len(kept) > 1 else 0] for p in range(len(parts))]
        if any(in_layer):
            layers[i] = LayerPlan(
                tuple(
                    draw_part(i, p) if in_layer[p] else skipped_part(part)
                    for p, part in enumerate(parts)
                ),
                factors[i],
            )
    return tuple(layers)
