"""Mean and spread of random gradients about the full model's, from a number of draws.

With g a draw's gradient and G the full model's on the same batch, both [P], K draws give

    bias^2    |E g - G|^2   the mean of (g_i - G)(g_j - G) over all pairs i < j
    variance  E|g - E g|^2  the sum over the parameters of their sample variances
    cosine    of E g and G, with |E g|^2 by the same pairs

The pairs make the first unbiased: |mean - G|^2 itself holds a K-th of the variance. Standard errors
are the jackknife's, which leaves a group of draws out at a time (Efron and Stein 1981), so that
sums over groups are all that is held: `GROUPS` vectors of the parameters, however many draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

GROUPS = 16


@dataclass(frozen=True)
class Moments:
    """What the draws on one batch leave, by groups R of draws.

    Attributes:
        counts: draws of every group, [R].
        squares: sum of |g - G|^2 over a group, [R].
        products: of the groups' sums of g - G with each other, [R, R].
        along: of these sums with G, [R].
        full: |G|^2.
    """

    counts: np.ndarray
    squares: np.ndarray
    products: np.ndarray
    along: np.ndarray
    full: float


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class GradientStatistics:
    """Means over the batches: bias and variance over |G|^2, and the cosine. The squared bias may
    come out below 0 where it is near it."""

    bias_squared: Estimate
    variance: Estimate
    cosine: Estimate

    @property
    def bias(self) -> float:
        """|E g - G| / |G|."""
        return math.sqrt(max(0.0, self.bias_squared.value))


def moments_of(full: Tensor, draws: Iterable[Tensor]) -> Moments:
    """Adds up the gradients [P] of the draws on a batch, about the full model's."""
    sums = torch.zeros(GROUPS, len(full), device=full.device)
    counts, squares = np.zeros(GROUPS), np.zeros(GROUPS)
    for number, gradient in enumerate(draws):
        apart = gradient - full
        sums[number % GROUPS] += apart
        counts[number % GROUPS] += 1
        squares[number % GROUPS] += (apart @ apart).item()
    used = int((counts > 0).sum())
    sums = sums[:used]
    return Moments(
        counts[:used],
        squares[:used],
        (sums @ sums.T).double().cpu().numpy(),
        (sums @ full).double().cpu().numpy(),
        (full @ full).item(),
    )


def statistics(batches: list[Moments]) -> GradientStatistics:
    """What the draws on some batches say; the groups of all batches are of the same draws."""
    groups = len(batches[0].counts)
    whole = _values(batches, np.ones(groups))
    without = np.array([_values(batches, row) for row in 1.0 - np.eye(groups)])
    spread = ((without - without.mean(0)) ** 2).sum(0)
    errors = np.sqrt((groups - 1) / groups * spread)
    return GradientStatistics(*map(Estimate, whole.tolist(), errors.tolist()))


def _values(batches: list[Moments], taken: np.ndarray) -> np.ndarray:
    """Squared bias, variance and cosine by the groups that are taken, 1 or 0 [R]."""
    sums = np.zeros(4)
    for batch in batches:
        count, squares = taken @ batch.counts, taken @ batch.squares
        of_sum = taken @ batch.products @ taken
        bias = (of_sum - squares) / (count * (count - 1))
        variance = (squares - of_sum / count) / (count - 1)
        sums += bias, variance, taken @ batch.along / count, batch.full
    bias, variance, along, full = sums
    length = full + 2 * along + bias  # |E g|^2
    cosine = (full + along) / math.sqrt(full * length) if length > 0 else 0.0
    return np.array([bias / full, variance / full, cosine])
