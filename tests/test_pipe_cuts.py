"""Where a pipeline is cut, and what it measures."""

from __future__ import annotations

import pytest
from cases.plans import TINYLLAMA, est, shape_of

from est_ds.config import Parallel
from est_ds.engine.layout import bubble, imbalance, pipe_cuts, schedule_costs, stage_costs
from est_ds.errors import UserError
from est_ds.plans.methods import build_method

SIZE = {"tokens": 2048, "sequence": 2048}


def full(shape):
    return build_method({"name": "full"}, seed=0, steps=10, shape=shape)


def test_the_head_counts_where_a_pipeline_is_cut():
    # A layer of TinyLlama-1.1B is 42 M weights with its scores, the head 65.5 M.
    cuts = pipe_cuts(full(TINYLLAMA), Parallel(pipe=4), **SIZE)
    assert cuts == [6, 12, 18, 22]
    costs = stage_costs(full(TINYLLAMA), 0, cuts, **SIZE)
    assert imbalance(costs) == pytest.approx(1.03, abs=0.02)
    equal = stage_costs(full(TINYLLAMA), 0, [6, 11, 16, 22], **SIZE)
    assert imbalance(equal) > 1.2


@pytest.mark.parametrize("pipe", range(1, 9))
def test_no_other_cut_has_a_cheaper_slowest_stage(pipe):
    from itertools import combinations

    method = full(shape_of(8))
    costs = schedule_costs(method, **SIZE)

    def slowest(cuts):
        return max(sum(costs[a:b]) for a, b in zip([0, *cuts], cuts))

    best = min(slowest([*cuts, 8]) for cuts in combinations(range(1, 8), pipe - 1))
    assert slowest(pipe_cuts(method, Parallel(pipe=pipe), **SIZE)) == best


def test_given_layers_are_taken_and_checked():
    given = Parallel(pipe=3, pipe_layers=[1, 2, 5])
    assert pipe_cuts(full(shape_of(8)), given, **SIZE) == [1, 3, 8]
    with pytest.raises(UserError, match="adds up to 8, and the model has 9"):
        pipe_cuts(full(shape_of(9)), given, **SIZE)
    with pytest.raises(UserError, match="whole runs"):
        pipe_cuts(est(shape_of(8), balance_groups=4), given, **SIZE)
    runs = Parallel(pipe=2, pipe_layers=[6, 2])
    assert pipe_cuts(est(shape_of(8), balance_groups=4), runs, **SIZE) == [6, 8]


def test_bubble_of_four_stages_and_eight_micro_batches():
    assert bubble(4, 8) == 3 / 11
