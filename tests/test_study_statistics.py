"""Statistics of studies, against cases worked out by hand and simulated studies of known truth."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
from scipy import stats

from est_ds.studies import statistics as st

# Student's t of 2 degrees of freedom has P(|t| > x) = 1 - x / sqrt(2 + x^2), and 4.3027 at 5 %.
THREE = {0: -0.01, 1: -0.02, 2: -0.03}
ZERO = dict.fromkeys(range(3), 0.0)


def test_paired_difference_by_hand():
    found = st.paired_difference({s: 3.0 + d for s, d in THREE.items()}, dict.fromkeys(THREE, 3.0))
    t = 0.02 / (0.01 / math.sqrt(3))
    assert found.pairs == 3 and found.spread == pytest.approx(0.01)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    half = 4.302652730 * 0.01 / math.sqrt(3)
    expected = (-0.02, -0.02 - half, -0.02 + half)
    assert (found.interval.mean, found.interval.low, found.interval.high) == pytest.approx(expected)


def test_only_seeds_that_both_have_are_paired():
    found = st.paired_difference({0: 2.0, 1: 3.0, 7: 9.0}, {1: 2.5, 0: 1.0, 3: 0.0})
    assert found.pairs == 2 and found.interval.mean == pytest.approx(0.75)
    with pytest.raises(ValueError, match="share no seed"):
        st.paired_difference({0: 1.0}, {1: 1.0})


def test_one_seed_has_no_interval_and_decides_nothing():
    found = st.paired_difference({0: 1.0}, {0: 2.0})
    assert found.interval == st.Interval(-1.0) and found.p is None
    assert st.verdict(found, st.holm([found.p])[0]) == "undecided"


def test_same_runs_show_no_difference():
    found = st.paired_difference({0: 1.5, 1: 1.25}, {0: 1.5, 1: 1.25})
    assert st.verdict(found, st.holm([found.p])[0]) == "no difference"


def test_holm_by_hand():
    # Sorted .01, .03, .04: .01 x 3, .03 x 2, and .04 x 1 raised to the one before.
    assert st.holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert st.holm([None]) == [None] and st.holm([]) == []


def test_verdict_is_the_sign_of_a_difference_that_is_certain_enough():
    falls = st.paired_difference({s: d - 0.2 for s, d in THREE.items()}, ZERO)
    rises = st.paired_difference({s: 0.2 - d for s, d in THREE.items()}, ZERO)
    assert st.verdict(falls, falls.p) == "pays" and st.verdict(rises, rises.p) == "costs"
    assert st.verdict(falls, 0.05) == "undecided"


@pytest.mark.parametrize("pairs", [2, 3, 5, 10])
def test_detectable_difference_is_found_in_four_of_five_studies(pairs):
    true = st.detectable(0.01, pairs)
    noise = np.random.default_rng(pairs).normal(true, 0.01, (20_000, pairs))
    found = (stats.ttest_1samp(noise, 0.0, axis=1).pvalue < 0.05).mean()
    assert found == pytest.approx(0.8, abs=0.01)


def test_seeds_that_are_needed_are_the_fewest_that_detect():
    for difference in (0.004, 0.01, 0.05):
        seeds = st.seeds_for(difference, 0.01)
        assert st.detectable(0.01, seeds) <= difference
        assert seeds == 2 or st.detectable(0.01, seeds - 1) > difference
    assert st.seeds_for(1e-6, 0.01) is None and st.seeds_for(0.0, 0.01) is None


def test_bootstrap_interval_is_that_of_the_mean_and_repeats():
    values = np.random.default_rng(0).normal(0.5, 1.0, 400)
    found = st.bootstrap_interval(values)
    assert found == st.bootstrap_interval(values) and found.mean == values.mean()
    by_t = st.t_interval(values)
    assert (found.low, found.high) == pytest.approx((by_t.low, by_t.high), abs=0.01)
    assert st.bootstrap_interval([2.0, 2.0]) == st.Interval(2.0, 2.0, 2.0)


COSTS = (0.5, 0.7, 0.85, 1.0, 1.2)


def truth(cost: float) -> float:
    return 2.0 + 1.3 * cost**-0.4


def test_curve_finds_the_law_it_was_made_of():
    curve = st.fit_curve(COSTS, [truth(c) for c in COSTS])
    assert curve.floor == pytest.approx(2.0, abs=1e-3)
    assert curve.exponent == pytest.approx(0.4, abs=1e-3)
    for cost in (0.5, 0.6, 0.93, 1.2):
        assert curve.loss(cost) == pytest.approx(truth(cost), abs=1e-6)
    for cost in (0.51, 0.6, 0.93, 1.19):
        assert curve.cost(truth(cost)) == pytest.approx(cost, rel=1e-4)


def test_curve_is_not_read_beyond_its_runs():
    curve = st.fit_curve(COSTS, [truth(c) for c in COSTS])
    assert curve.cost(truth(1.3)) == math.inf and curve.cost(truth(0.4)) == 0.0
    better = st.compute_gain({0: curve, 1: curve}, {0: truth(1.3), 1: truth(1.1)}, {0: 1, 1: 1})
    assert better.interval is None and better.bound == "> 1.1"
    worse = st.compute_gain({0: curve}, {0: truth(0.3)}, {0: 2.0})
    assert worse.interval is None and worse.bound == "< 0.25"


def test_curve_refuses_what_is_none():
    with pytest.raises(ValueError, match="three budgets"):
        st.fit_curve([1.0, 2.0, 2.0], [3.0, 2.0, 2.0])
    with pytest.raises(ValueError, match="does not fall"):
        st.fit_curve([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    with pytest.raises(ValueError, match="rises at its end"):  # the text is learnt by heart
        st.fit_curve([1.0, 2.0, 3.0, 4.0], [4.4, 4.0, 4.2, 4.5])
    assert st.fit_curve([1.0, 2.0, 3.0, 4.0], [4.4, 4.0, 3.9, 3.92]).loss(4.0) < 4.0  # noise


def test_gain_by_hand():
    curve = st.fit_curve(COSTS, [truth(c) for c in COSTS])
    gains = {0: 1.0, 1: 1.1}
    losses = {seed: truth(0.8 * gain) for seed, gain in gains.items()}
    found = st.compute_gain(dict.fromkeys(gains, curve), losses, dict.fromkeys(gains, 0.8))
    assert found.pairs == 2 and found.interval.mean == pytest.approx(math.sqrt(1.1), rel=1e-4)
    # Student's t of one degree of freedom is 12.706; the error of two values half their distance.
    half = 12.7062 * math.log(1.1) / 2
    assert math.log(found.interval.high / found.interval.mean) == pytest.approx(half, rel=1e-3)


def simulated(rng, seeds: int, arm_cost: float, gain: float):
    """Losses of the baseline's budgets and of an arm, [seeds, 6]: seeds differ, and runs do."""
    expected = [truth(c) for c in COSTS] + [truth(arm_cost * gain)]
    return np.array(expected) + rng.normal(0, 0.01, (seeds, 1)) + rng.normal(0, 0.003, (seeds, 6))


def test_95_percent_intervals_of_differences_hold_the_truth_in_95_percent_of_studies():
    rng, held, wrong = np.random.default_rng(1), 0, 0
    for _ in range(1000):
        runs = simulated(rng, 3, 1.0, 1.0)
        arm, base = (dict(enumerate(runs[:, column])) for column in (5, 3))
        found = st.paired_difference(arm, base)
        held += found.interval.low <= 0.0 <= found.interval.high
        wrong += st.verdict(found, found.p) == "pays"
    assert 930 <= held <= 970
    assert wrong <= 50


@pytest.fixture
def quick_collections():
    """statsmodels collects garbage in every correction: of this process, 40 ms each."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_no_arm_of_ten_without_effect_pays_in_more_than_5_percent_of_studies(quick_collections):
    rng, wrong = np.random.default_rng(2), 0
    for _ in range(1000):
        base = rng.normal(0, 0.003, 3)  # the same baseline for all arms
        arms = [
            st.paired_difference(dict(enumerate(rng.normal(0, 0.003, 3))), dict(enumerate(base)))
            for _ in range(10)
        ]
        corrected = st.holm([arm.p for arm in arms])
        wrong += any(st.verdict(arm, p) == "pays" for arm, p in zip(arms, corrected))
    assert wrong <= 50


@pytest.mark.parametrize("gain", [1.0, pytest.param(1.15, marks=pytest.mark.slow)])
def test_95_percent_intervals_of_gains_hold_the_truth_in_95_percent_of_studies(gain):
    rng, held, by_bootstrap = np.random.default_rng(3), 0, 0
    for study in range(1000):
        runs = simulated(rng, 3, 0.8, gain)
        curves = {s: st.fit_curve(COSTS, runs[s, :5]) for s in range(3)}
        found = st.compute_gain(curves, dict(enumerate(runs[:, 5])), dict.fromkeys(range(3), 0.8))
        held += found.interval.low <= gain <= found.interval.high
        logs = np.log([curves[s].cost(runs[s, 5]) / 0.8 for s in range(3)])
        means = logs[rng.integers(0, 3, (500, 3))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        by_bootstrap += low <= math.log(gain) <= high
    assert 930 <= held <= 970
    assert by_bootstrap < 850, "three seeds are too few for a bootstrap"
