"""How far a step moves the weights of the layers, from a sample of them.

Of every matrix of a layer up to `PLACES` elements are looked at before and after a step: one drawn
from each of as many equal ranges of the flattened matrix, by the matrix's Hugging Face name alone,
so that every run, step and layout looks at the same. An element stands for all of its range, and
each is read where it lives, so that nothing is gathered but two sums.

Embeddings and output head are left out: rows of tokens that a batch does not hold hardly move.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from est_ds.engine.fragments import Fragments
from est_ds.plans import draw

PLACES = 1024


@dataclass(frozen=True)
class Sample:
    """Sampled fp32 weights that live in this process.

    Attributes:
        values: float64 [n].
        stand_for: elements of the model that each stands for, float64 [n].
    """

    values: Tensor
    stand_for: Tensor

    def rms_to(self, after: Sample) -> float:
        """Root mean square of the change to a later sample of the same layers, over all processes;
        every one calls it."""
        squares = (after.values - self.values).square() @ self.stand_for
        sums = torch.stack([squares, self.stand_for.sum()])
        dist.all_reduce(sums)
        total, count = sums.tolist()
        return sqrt(total / count) if count else 0.0


class Sampler:
    """Samples weights of layers.

    Args:
        fragments: the weights of this process.
        paths: what the names of each layer's parameters begin with.
    """

    def __init__(self, fragments: Fragments, paths: dict[int, str]) -> None:
        self._fragments = fragments
        self._layers: dict[str, int] = {}
        self._places: dict[str, np.ndarray] = {}
        for name, shape in fragments.shapes.items():
            layer = next((i for i, path in paths.items() if name.startswith(path)), None)
            if layer is not None and len(shape) >= 2:
                self._layers[name], self._places[name] = layer, places(name, prod(shape))

    @torch.no_grad()
    def sample(self, layers: Collection[int]) -> Sample:
        """The sampled weights of layers, in an order that does not change."""
        values, stand_for = [], []
        for part in self._fragments.owned():
            if self._layers.get(part.name) not in layers:
                continue
            own = self._places[part.name]
            first, last = np.searchsorted(own, [part.start, part.stop])
            weight = part.states["weight"]
            at = torch.from_numpy(own[first:last] - part.start).to(weight.device)
            values.append(weight.index_select(0, at).double())
            each = prod(self._fragments.shapes[part.name]) / len(own)
            stand_for.append(torch.full_like(values[-1], each))
        if not values:
            return Sample(*torch.zeros(2, 0, dtype=torch.float64, device=self._fragments.device))
        device = self._fragments.device
        return Sample(torch.cat(values).to(device), torch.cat(stand_for).to(device))


def places(name: str, size: int) -> np.ndarray:
    """Sorted places, at most `PLACES`, in a flattened parameter of `size` elements, int64."""
    if size <= PLACES:
        return np.arange(size)
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    within = draw.keys(key, 0, 0, 0, PLACES) / draw.KEY_RANGE
    ends = np.arange(PLACES + 1) * size // PLACES
    return ends[:-1] + (within * np.diff(ends)).astype(np.int64)
