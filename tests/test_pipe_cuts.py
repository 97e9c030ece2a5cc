"""Where a pipeline is cut, and what it measures."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations

import pytest

from cases.plans import TINYLLAMA, est, shape_of
from est_ds.config.sections import Parallel
from est_ds.cost.pipe_cuts import bubble, imbalance, pipe_cuts, pipe_stage_costs
from est_ds.errors import UserError
from est_ds.plans.methods import build_method

SIZE = {"tokens": 2048, "sequence": 2048}


def full(shape):
    return build_method({"name": "full"}, seed=0, steps=10, shape=shape)


def test_the_head_counts_where_a_pipeline_is_cut():
    # A layer of TinyLlama-1.1B is 42 M weights with its scores, the head 65.5 M.
    cuts = pipe_cuts(full(TINYLLAMA), Parallel(pipe=4), **SIZE)
    assert cuts == [6, 12, 18, 22]
    costs = pipe_stage_costs(full(TINYLLAMA), 0, cuts, **SIZE)
    assert imbalance(costs) == pytest.approx(1.03, abs=0.02)
    equal = pipe_stage_costs(full(TINYLLAMA), 0, [6, 11, 16, 22], **SIZE)
    assert imbalance(equal) > 1.2


def grows(name, **settings):
    """A method whose phases leave different layers out."""
    phases = [{"until": u, "layers": n} for u, n in ((6, 2), (12, 5), (20, 8))]
    section = {"name": name, "phases": phases, **settings}
    return build_method(section, seed=0, steps=20, shape=shape_of(8))


METHODS = {
    "full": lambda: full(shape_of(8)),
    "raptr": lambda: grows("raptr"),
    "raptr, other fixed layers": lambda: grows("raptr", always_keep=[0, 3]),
    "stacking": lambda: grows("stacking", mode="random"),
}


@pytest.mark.parametrize("name", METHODS)
def test_no_other_cut_costs_less_over_all_phases(name):
    method = METHODS[name]()

    def cost(cuts):
        return sum(
            (phase.until_step - phase.from_step) * max(pipe_stage_costs(method, i, cuts, **SIZE))
            for i, phase in enumerate(method.phases)
        )

    for pipe in range(1, 9):
        best = min(cost([*cuts, 8]) for cuts in combinations(range(1, 8), pipe - 1))
        cuts = pipe_cuts(method, Parallel(pipe=pipe), **SIZE)
        assert len(cuts) == pipe and cost(cuts) == pytest.approx(best, rel=1e-12)


def test_every_phase_waits_for_its_own_busiest_stage():
    # In layers, the head being 2 of them: with 6 | 2 the first 6 steps, whose paths are layers 0
    # and 7, take max(1, 1 + 2) each, the 10 others max(6, 2 + 2), together 78; with 5 | 3 they take
    # max(1, 3) and max(5, 5), together 68. Sums over the run would be 66 | 58, and 56 | 68.
    shape = replace(shape_of(8), vocabulary=400)
    size = {"tokens": 16, "sequence": 16}
    phases = [{"until": 6, "layers": 2}, {"until": 16, "layers": 8}]
    method = build_method({"name": "raptr", "phases": phases}, seed=0, steps=16, shape=shape)
    layer = pipe_stage_costs(method, 1, [1, 8], **size)[0]
    assert pipe_stage_costs(method, 0, [6, 8], **size) == [layer, 3 * layer]
    assert pipe_stage_costs(method, 1, [6, 8], **size) == [6 * layer, 4 * layer]
    assert pipe_cuts(method, Parallel(pipe=2), **size) == [5, 8]


def test_a_deep_model_is_cut_at_once():
    # 96 layers on 16 stages: 10^17 cuts.
    depths = [24, 32, 48, 72, 95, 96]
    phases = [{"until": (i + 1) / 6, "layers": n} for i, n in enumerate(depths)]
    section = {"name": "stacking", "mode": "random", "phases": phases}
    method = build_method(section, seed=0, steps=60, shape=shape_of(96))
    began = time.process_time()
    pipe_cuts(method, Parallel(pipe=16), **SIZE)
    assert time.process_time() - began < 10.0


def test_given_layers_are_taken_and_checked():
    given = Parallel(pipe=3, pipe_layers=[1, 2, 5])
    assert pipe_cuts(full(shape_of(8)), given, **SIZE) == [1, 3, 8]
    with pytest.raises(UserError, match="adds up to 8, and the model has 9 layers; give"):
        pipe_cuts(full(shape_of(9)), given, **SIZE)
    with pytest.raises(UserError, match="whole bands"):
        pipe_cuts(est(shape_of(8), balance_groups=4), given, **SIZE)
    bands = Parallel(pipe=2, pipe_layers=[6, 2])
    assert pipe_cuts(est(shape_of(8), balance_groups=4), bands, **SIZE) == [6, 8]


def test_bubble_of_four_stages_and_eight_micro_batches():
    assert bubble(4, 8) == 3 / 11
