"""Addressed random draws: each is a pure function of (seed, kind, layer, step)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Kinds of draws: whole layers; part p of the layers (skipped apart); positions of the sequences;
# units of part p of a layer.
LAYERS, SUBLAYERS, POSITIONS, UNITS = 1, 2, 8, 16
KEY_RANGE = 2.0**32


def keys(seed: int, kind: int, layer: int, step: int, n: int) -> np.ndarray:
    """`n` uniform 32-bit keys, uint32 [n].

    The address fills the high words of Philox's counter, so that streams of neighbouring
    steps never overlap, and `random_raw` is a stream that NumPy keeps fixed. A 64-bit word of it
    gives two keys, low half first.
    """
    words = np.random.Philox(key=seed, counter=[0, kind, layer, step]).random_raw((n + 1) // 2)
    return words.astype("<u8", copy=False).view("<u4")[:n]


@dataclass(frozen=True)
class Address:
    """What the draws of a plan are a function of.

    Attributes:
        micro_batch: index in the global batch; 0 where the micro-batches of a step share a plan.
    """

    seed: int
    step: int
    micro_batch: int = 0

    def keys(self, kind: int, layer: int, n: int) -> np.ndarray:
        """`n` uniform 32-bit keys, uint32 [n]."""
        # Kinds are small: the index has the upper half of their word.
        return keys(self.seed, kind | self.micro_batch << 32, layer, self.step, n)


def smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Sorted positions of the `k` smallest values; ties go to the lower position."""
    if k >= len(values):
        return np.arange(len(values))
    if k == 0:
        return np.arange(0)
    bound = np.partition(values, k - 1)[k - 1]
    kept = np.flatnonzero(values <= bound)
    if len(kept) != k:
        kept = np.sort(np.argsort(values, kind="stable")[:k])
    return kept


def smallest_per_group(values: np.ndarray, k: int) -> np.ndarray:
    """The `k` smallest of every row of `values` [groups, n], as sorted flat positions."""
    groups, n = values.shape
    kept = np.argsort(values, axis=1, kind="stable")[:, :k]
    kept.sort(axis=1)
    return (kept + np.arange(0, groups * n, n)[:, None]).reshape(-1)


def below(values: np.ndarray, probability: float | np.ndarray) -> np.ndarray:
    """Independent Bernoulli outcomes of the keys, bool [n]; certain at probability 0 and 1."""
    return values < np.asarray(probability) * KEY_RANGE
