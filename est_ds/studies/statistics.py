"""What the losses of a study say: differences with intervals, power, and the gain in compute.

An arm and the baseline of one seed begin with the same weights and read the same batches, so that
differences are taken seed by seed. Intervals are of 95 %, tests are two-sided at 5 %, and power is
80 %. Losses are nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from scipy import optimize, special, stats
from statsmodels.stats.multitest import multipletests

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 1000  # more are not asked for
RESAMPLES = 9999
EXPONENTS = (0.01, 5.0)
ROUNDING = 1e-9
# A loss that rises again by more than this part of its range is not that of a curve that falls.
RISE = 0.25
LEAST_PAIRS = 4  # of a rank correlation

Verdict = Literal["pays", "costs", "no difference", "undecided"]
Seeds = Mapping[int, float]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; without one where a single value was seen."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """Loss of an arm less that of the baseline, over the seeds that both have.

    Attributes:
        interval: of the mean difference.
        pairs: number of seeds.
        spread: standard deviation of the differences; None of a single one.
        p: of the paired t test; None of a single pair.
        detectable: the smallest true difference that this number of seeds shows with a chance of
            80 %, by a test of this arm alone.
    """

    interval: Interval
    pairs: int
    spread: float | None
    p: float | None
    detectable: float | None


def paired_difference(arm: Seeds, baseline: Seeds) -> Difference:
    """Compares an arm with the baseline by a paired t test.

    Args:
        arm: held-out loss by seed.
        baseline: the same of the baseline.

    Raises:
        ValueError: they share no seed.
    """
    shared = sorted(arm.keys() & baseline.keys())
    if not shared:
        raise ValueError("the arm and the baseline share no seed")
    differences = np.array([arm[seed] - baseline[seed] for seed in shared])
    interval = t_interval(differences)
    if len(shared) == 1:
        return Difference(interval, 1, None, None, None)
    if not differences.any():  # the same runs twice, of which a t test says nothing
        return Difference(interval, len(shared), 0.0, 1.0, 0.0)
    spread = float(differences.std(ddof=1))
    if spread <= ROUNDING * abs(float(differences.mean())):
        # The same runs several times under other numbers, of which no interval can be told.
        return Difference(Interval(interval.mean), len(shared), None, None, None)
    t = float(differences.mean()) / spread * math.sqrt(len(shared))
    p = 2 * float(special.stdtr(len(shared) - 1, -abs(t)))
    return Difference(interval, len(shared), spread, p, detectable(spread, len(shared)))


def t_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Returns the mean of independent values, and its interval by Student's t."""
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return Interval(mean)
    quantile = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def bootstrap_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Returns the mean of many values, such as differences by window, and its interval by the
    bias-corrected and accelerated bootstrap (Efron 1987), the same for the same values."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 1 or not np.ptp(values):
        return Interval(float(values.mean()), *(2 * [float(values[0])] if len(values) > 1 else []))
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        batch=256,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(values.mean()), float(found.low), float(found.high))


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation of two values of the same things.

    Attributes:
        low, high: its 95 % interval; None where the ranks agree or disagree throughout.
        p: two-sided, of the ranks' having nothing to do with each other: by permutations.
    """

    value: float
    low: float | None
    high: float | None
    p: float

    @property
    def is_least(self) -> bool:
        """Whether so many random permutations can give no smaller p."""
        return self.p <= 2 / (RESAMPLES + 1)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> RankCorrelation | None:
    """Returns Spearman's correlation; None of fewer than four pairs, or of values that are equal.

    The interval is Fisher's, with the variance (1 + r^2 / 2) / (n - 3) of Bonett and Wright (2000).
    All permutations are tried of up to seven pairs, `RESAMPLES` of more, the same ones each time.
    """
    n = len(x)
    if n < LEAST_PAIRS or not np.ptp(x) or not np.ptp(y):
        return None
    value = float(stats.spearmanr(x, y).statistic)
    of_x, of_y = (stats.rankdata(values) - (n + 1) / 2 for values in (x, y))
    p = stats.permutation_test(
        (of_x,),
        lambda ranks, axis: (ranks * of_y).sum(axis),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    ).pvalue
    if abs(value) > 1 - ROUNDING:
        return RankCorrelation(value, None, None, float(p))
    half = special.ndtri((1 + CONFIDENCE) / 2) * math.sqrt((1 + value**2 / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(value) + sign * half) for sign in (-1, 1))
    return RankCorrelation(value, low, high, float(p))


def detectable(spread: float, pairs: int, tests: int = 1) -> float:
    """Returns the smallest true difference that is found with a chance of 80 %.

    Args:
        spread: standard deviation of paired differences.
        pairs: number of seeds, at least 2.
        tests: how many arms are tested; Holm's first step, which no arm can be sure to be spared,
            tests at 5 % over their number.
    """
    return _detectable_effect(pairs, tests) * spread


@cache
def _detectable_effect(pairs: int, tests: int) -> float:
    low, high = 0.0, 1.0
    while _power(high, pairs, tests) < POWER:
        high *= 2
    return float(optimize.brentq(lambda e: _power(e, pairs, tests) - POWER, low, high))


def _power(effect: float, pairs: int, tests: int) -> float:
    """Chance that a paired t test finds a difference of so many standard deviations, and with the
    right sign: by the noncentral t. (`TTestPower` of statsmodels 0.15 adds the other tail, which is
    not a number for many effects.)"""
    edge = float(special.stdtrit(pairs - 1, 1 - ALPHA / tests / 2))
    return float(stats.nct.sf(edge, pairs - 1, effect * math.sqrt(pairs)))


def seeds_for(difference: float, spread: float, tests: int = 1) -> int | None:
    """Returns how many seeds show a true difference with a chance of 80 %; None: over 1,000.

    Args:
        tests: as of `detectable`.
    """
    if difference == 0:
        return None
    if spread == 0:
        return 2

    def suffice(seeds: int) -> bool:
        return _power(abs(difference) / spread, seeds, tests) >= POWER

    too_few, enough = 1, 2
    while not suffice(enough):
        too_few, enough = enough, 2 * enough
        if enough > 2 * MOST_SEEDS:
            return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if suffice(middle) else (middle, enough)
    return enough if enough <= MOST_SEEDS else None


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Returns p values corrected for as many tests (Holm 1979); None stays None."""
    given = [p for p in ps if p is not None]
    corrected = iter(multipletests(given, ALPHA, "holm")[1].tolist() if given else [])
    return [None if p is None else next(corrected) for p in ps]


def verdict(difference: Difference, corrected: float | None) -> Verdict:
    """Returns what a difference says, by its p value corrected for the number of arms."""
    if difference.spread == 0.0 and difference.interval.mean == 0.0:
        return "no difference"
    if corrected is None or not corrected < ALPHA:
        return "undecided"
    return "pays" if difference.interval.mean < 0 else "costs"


@dataclass(frozen=True)
class Curve:
    """Loss of fully decayed baseline runs over their cost, L = E + A (C / C0)^-a.

    Attributes:
        floor: E, nats, at least 0.
        scale: A, nats, at least 0.
        exponent: a.
        unit: C0, the geometric mean of the costs.
        costs: the least and the largest cost it was fitted to; beyond them it says nothing.
    """

    floor: float
    scale: float
    exponent: float
    unit: float
    costs: tuple[float, float]

    def loss(self, cost: float) -> float:
        """Returns the loss at a cost; outside of `costs` it is a guess."""
        return self.floor + self.scale * (cost / self.unit) ** -self.exponent

    def cost(self, loss: float) -> float:
        """Returns the cost that reaches a loss; infinite or 0 beyond the costs of the fit."""
        least, most = (self.loss(cost) for cost in reversed(self.costs))
        if loss < least * (1 - ROUNDING):
            return math.inf
        if loss > most * (1 + ROUNDING):
            return 0.0
        return self.cost_beyond(loss)

    def cost_beyond(self, loss: float) -> float:
        """As `cost`; beyond the costs of the fit it is a guess, infinite of no more than E."""
        if loss <= self.floor:
            return math.inf
        return self.unit * ((loss - self.floor) / self.scale) ** (-1 / self.exponent)


def fit_curve(costs: Sequence[float], losses: Sequence[float]) -> Curve:
    """Fits L = E + A C^-a by least squares, with E and A at least 0.

    For a given exponent E and A are a linear fit, so that one number is searched for.

    Args:
        costs: FLOPs or seconds of the runs, at least three different ones.
        losses: their held-out losses at the end of their own schedules.

    Raises:
        ValueError: too few costs, the loss does not fall with them, or it rises again.
    """
    x, y = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(set(costs)) < 3:
        raise ValueError("a curve needs baseline runs of at least three budgets")
    if y[x.argmax()] - y.min() > RISE * np.ptp(y):
        raise ValueError("the baseline's loss rises at its end: no curve that falls fits it")
    unit = float(np.exp(np.log(x).mean()))

    def fit(log_exponent: float) -> tuple[np.ndarray, float]:
        powers = (x / unit) ** -math.exp(log_exponent)
        return optimize.nnls(np.stack([np.ones_like(x), powers], axis=1), y)

    found = optimize.minimize_scalar(
        lambda log_exponent: fit(log_exponent)[1],
        bounds=[math.log(exponent) for exponent in EXPONENTS],
        method="bounded",
    )
    floor, scale = fit(found.x)[0]
    if scale * (min(x) / unit) ** -math.exp(found.x) <= 1e-12 * y.mean():
        raise ValueError("the baseline's loss does not fall with its budget: no curve fits it")
    ends = float(x.min()), float(x.max())
    return Curve(float(floor), float(scale), math.exp(found.x), unit, ends)


@dataclass(frozen=True)
class Gain:
    """Compute-equivalent gain: what the baseline costs to reach an arm's loss, over what the arm
    costs. Above 1 the arm is cheaper.

    Attributes:
        interval: of the gain, by Student's t over the seeds' logarithms; None where it is beyond
            the baseline's runs.
        bound: then what is known, such as `> 1.2`; otherwise empty.
        pairs: number of seeds.
    """

    interval: Interval | None
    bound: str
    pairs: int


def compute_gain(curves: Mapping[int, Curve], losses: Seeds, costs: Mapping[int, float]) -> Gain:
    """The gain of an arm over seeds that have a curve.

    A curve is fitted for every seed and the spread of the seeds' gains gives the interval: a
    bootstrap over three seeds has 10 different samples, and its 95 % intervals hold the truth in
    about 75 % of studies (a test has the figures).

    Args:
        curves: the baseline's curve by seed.
        losses: the arm's held-out losses by seed.
        costs: what the arm's runs cost, as the curves count.

    Raises:
        ValueError: no seed has both.
    """
    shared = sorted(curves.keys() & losses.keys())
    if not shared:
        raise ValueError("no seed has a curve of the baseline and a run of the arm")
    reached = [curves[seed].cost(losses[seed]) / costs[seed] for seed in shared]
    if all(0 < gain < math.inf for gain in reached):
        logs = t_interval(np.log(reached))
        ends = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
        return Gain(Interval(math.exp(logs.mean), *ends), "", len(shared))
    most = [curves[seed].costs[1] / costs[seed] for seed in shared]
    least = [curves[seed].costs[0] / costs[seed] for seed in shared]
    if all(gain > 0 for gain in reached):
        low = min(bound if gain == math.inf else gain for gain, bound in zip(reached, most))
        return Gain(None, f"> {low:.3g}", len(shared))
    if all(gain < math.inf for gain in reached):
        high = max(bound if gain == 0 else gain for gain, bound in zip(reached, least))
        return Gain(None, f"< {high:.3g}", len(shared))
    return Gain(None, "not between the baseline's budgets", len(shared))
