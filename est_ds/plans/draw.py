"""Addressed random draws: each is a pure function of (seed, kind, layer, step)."""

from __future__ import annotations

import numpy as np

LAYERS, UNITS = 1, 16  # kinds of draws; part p of a layer draws with kind UNITS + p


def keys(seed: int, kind: int, layer: int, step: int, n: int) -> np.ndarray:
    """`n` uniform 64-bit keys, uint64 [n].

    The address fills the high words of Philox's counter, so that streams of neighbouring
    steps never overlap, and `random_raw` is a stream that NumPy keeps fixed.
    """
    return np.random.Philox(key=seed, counter=[0, kind, layer, step]).random_raw(n)


def smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Sorted positions of the `k` smallest values; ties go to the lower position."""
    if k >= len(values):
        return np.arange(len(values))
    bound = np.partition(values, k - 1)[k - 1]
    kept = np.flatnonzero(values <= bound)
    if len(kept) != k:
        kept = np.sort(np.argsort(values, kind="stable")[:k])
    return kept


def subset(seed: int, kind: int, layer: int, step: int, n: int, k: int) -> np.ndarray:
    """A uniform subset of `k` of range(n), sorted int64 [k]."""
    return smallest(keys(seed, kind, layer, step, n), k)


def subset_per_group(
    seed: int, kind: int, layer: int, step: int, groups: int, n: int, k: int
) -> np.ndarray:
    """`k` of each of `groups` consecutive runs of `n` units, sorted int64 [groups * k]."""
    drawn = keys(seed, kind, layer, step, groups * n).reshape(groups, n)
    rows = [smallest(row, k) + g * n for g, row in enumerate(drawn)]
    return np.concatenate(rows)
