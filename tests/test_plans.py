"""Plans of `est` and `full`: pure, of the exact size, uniform, the same from version to version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from cases.plans import GOLDEN, PHASES, TINYLLAMA, assert_uniform, digests, est, shape_of
from est_ds.plans import balance


def counts_of(method, steps: int, sets) -> np.ndarray:
    """How often each unit occurs, where `sets` gives the kept units of a plan."""
    found = [i for step in range(steps) for i in sets(method.plan(step))]
    return np.bincount(found)


def golden_sections() -> dict:
    return {
        "est": (shape_of(6), dict(name="est", phases=PHASES)),
        "est_groups": (shape_of(6), dict(name="est", phases=PHASES, head_rule="groups")),
        "est_multi_head": (shape_of(6, groups=8), dict(name="est", phases=PHASES)),
        "est_balanced": (
            shape_of(7),
            dict(
                name="est",
                phases=PHASES,
                balance_groups=[2, 3, 2],
                always_keep=[0, -1],
                scale=dict(layers="sqrt"),
            ),
        ),
        "est_tinyllama": (TINYLLAMA, dict(name="est", phases=PHASES, balance_groups=[6, 5, 5, 6])),
        "full": (shape_of(6), dict(name="full")),
    }


@pytest.mark.parametrize("name", golden_sections())
def test_digests_are_those_of_the_first_version(name):
    """A changed digest means that old runs cannot be resumed: say so if it is meant."""
    golden = json.loads((GOLDEN / "plans.json").read_text())
    assert digests(*golden_sections()[name]) == golden[name]


def test_plan_depends_on_method_seed_step_and_shape_only():
    shape = shape_of(6)
    one, other = est(shape), est(shape)
    forwards = [one.plan(s).digest for s in range(20)]
    backwards = [other.plan(s).digest for s in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 20
    assert est(shape, seed=8).plan(3).digest != forwards[3]
    assert [one.plan(3).digest for _ in range(3)] == [forwards[3]] * 3


def test_plan_neither_reads_nor_moves_the_global_generator():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = est(shape_of(6)).plan(5).digest
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    assert est(shape_of(6)).plan(5).digest == first


@pytest.mark.parametrize("rank", [0, 3])
def test_plan_is_the_same_in_every_process_and_at_every_world_size(rank):
    code = (
        "import json, sys; sys.path.insert(0, 'tests'); import test_plans as t;"
        "print(json.dumps(t.digests(*t.golden_sections()['est_balanced'])))"
    )
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(rank + 1),
        "PYTHONHASHSEED": str(rank + 5),
        "PYTHONPATH": str(root),
    }
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, check=True
    ).stdout
    assert json.loads(out) == digests(*golden_sections()["est_balanced"])


def test_plans_import_no_torch():
    code = "import sys, est_ds.plans.methods, est_ds.cost.flops; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_counts_are_exact_and_scales_are_what_was_realised():
    plan = est(
        shape_of(7, columns=25), phases=[dict(until=1.0, layers=0.4, heads=0.5, columns=0.3)]
    ).plan(9)
    assert len(plan.kept_layers) == 3  # 2.8
    for layer in (plan.layers[i] for i in plan.kept_layers):
        attention, mlp = layer.parts
        assert (attention.count, mlp.count, layer.scale) == (4, 8, 1.0)  # 8 of 25: round(7.5)
        assert (attention.scale, mlp.scale) == (2.0, 25 / 8)


def test_at_least_one_of_everything_is_kept():
    tiny = dict(until=1.0, layers=0.01, heads=0.01, columns=0.01)
    plan = est(shape_of(6), phases=[tiny], head_rule="groups").plan(0)
    assert len(plan.kept_layers) == 1
    attention, mlp = plan.layers[plan.kept_layers[0]].parts
    assert (attention.count, len(attention.key_value_groups), mlp.count) == (2, 1, 1)


def test_within_groups_keeps_as_many_heads_in_every_group_and_all_keys():
    for step in range(20):
        for layer in filter(None, est(shape_of(6)).plan(step).layers):
            attention = layer.parts[0]
            assert attention.key_value_groups is None
            assert (attention.units // 2).tolist() == [0, 1, 2, 3]


def test_groups_rule_keeps_whole_key_value_groups():
    for layer in filter(None, est(shape_of(6), head_rule="groups").plan(1).layers):
        attention = layer.parts[0]
        assert attention.units.tolist() == [
            h for g in attention.key_value_groups for h in (2 * g, 2 * g + 1)
        ]
        assert len(attention.key_value_groups) == 2


@pytest.mark.parametrize("head_rule", ["within_groups", "groups"])
def test_without_grouped_queries_a_head_is_dropped_with_its_key_and_value(head_rule):
    for layer in filter(None, est(shape_of(6, groups=8), head_rule=head_rule).plan(1).layers):
        attention = layer.parts[0]
        assert attention.count == 4
        assert attention.units.tolist() == attention.key_value_groups.tolist()


def test_phase_that_keeps_everything_is_the_full_plan():
    plan = est(shape_of(6), phases=PHASES).plan(60)
    assert plan.is_full and plan.phase == 2
    assert not est(shape_of(6), phases=PHASES).plan(30).is_full


def test_every_subset_of_layers_is_equally_likely():
    method = est(shape_of(5), steps=3000, phases=[dict(until=1.0, layers=0.4)])
    seen = {pair: 0 for pair in combinations(range(5), 2)}
    for step in range(3000):
        seen[method.plan(step).kept_layers] += 1
    assert_uniform(np.array(list(seen.values())), [1] * 3000, 10)


@pytest.mark.parametrize("groups", [None, 3, [6, 5, 5, 6], 4])
@pytest.mark.parametrize("layers", [0.5, 0.61])
def test_layers_are_uniform_in_every_run(groups, layers):
    """0.61 of 22 is 13, which no number of runs divides; nor does 22 divide into 3 or 4."""
    steps, method = (
        2200,
        est(
            shape_of(22), steps=2200, phases=[dict(until=1.0, layers=layers)], balance_groups=groups
        ),
    )
    lengths = method.band_lengths or (22,)
    ends = np.cumsum(lengths)
    kept = [method.plan(s).kept_layers for s in range(steps)]
    count = round(layers * 22)
    assert {len(k) for k in kept} == {count}
    for end, n in zip(ends, lengths):
        inside = [[i for i in k if end - n <= i < end] for k in kept]
        sizes = [len(i) for i in inside]
        assert min(sizes) >= count * n // 22 and max(sizes) <= -(-count * n // 22)
        # Over whole turns of the remainder, no run has more than its share.
        assert sum(sizes) * 22 == count * n * steps
        assert_uniform(np.bincount(np.concatenate(inside), minlength=22)[end - n : end], sizes, n)


@pytest.mark.parametrize(
    ("shape", "head_rule"),
    [(shape_of(1), "within_groups"), (shape_of(1), "groups"), (shape_of(1, groups=8), "groups")],
)
def test_heads_are_uniform(shape, head_rule):
    method = est(
        shape, steps=2000, phases=[dict(until=1.0, heads=0.5)], head_rule=head_rule, seed=3
    )
    counts = counts_of(method, 2000, lambda plan: plan.layers[0].parts[0].units)
    if head_rule == "groups":  # heads of a group go together
        counts = counts[:: 8 // shape.layers[0][0].key_value_groups]
        assert_uniform(counts, [len(counts) / 2] * 2000, len(counts))
        return
    for pair in counts.reshape(4, 2):
        assert_uniform(pair, [1] * 2000, 2)


def test_columns_are_uniform_and_layers_independent():
    method = est(shape_of(2, columns=40), steps=1500, phases=[dict(until=1.0, columns=0.3)])
    for i in range(2):
        counts = counts_of(method, 1500, lambda plan: plan.layers[i].parts[1].units)
        assert_uniform(counts, [12] * 1500, 40)
    overlaps = [
        len(np.intersect1d(*(layer.parts[1].units for layer in method.plan(s).layers)))
        for s in range(1500)
    ]
    assert abs(np.mean(overlaps) - 12 * 12 / 40) < 0.2  # deviation of the mean: 0.04


def test_always_kept_layers_are_kept_and_the_others_uniform():
    method = est(shape_of(8), steps=1200, phases=[dict(until=1.0, layers=0.5)], always_keep=[0, -1])
    counts = counts_of(method, 1200, lambda plan: plan.kept_layers)
    assert counts[0] == counts[7] == 1200
    assert_uniform(counts[1:7], [2] * 1200, 6)


def test_a_phase_can_have_its_own_always_kept_layers():
    phases = [
        dict(until=50, layers=0.25, always_keep=[3]),
        dict(until=100, layers=0.25, always_keep=[]),
    ]
    method = est(shape_of(8), phases=phases, always_keep=[0])
    assert all(3 in method.plan(s).kept_layers for s in range(50))
    assert {i for s in range(50, 100) for i in method.plan(s).kept_layers} == set(range(8))


def test_every_run_keeps_a_layer_even_when_its_share_is_less():
    method = est(shape_of(22), phases=[dict(until=1.0, layers=0.2)], balance_groups=[6, 5, 5, 6])
    for step in range(50):
        kept = np.array(method.plan(step).kept_layers)
        assert len(kept) == 4
        assert set(np.searchsorted([6, 11, 16, 22], kept, side="right")) == {0, 1, 2, 3}


def test_inverse_layer_scale_is_one_over_the_chance_to_be_kept():
    method = est(
        shape_of(8),
        phases=[dict(until=1.0, layers=0.5)],
        always_keep=[0, -1],
        scale=dict(layers="inverse"),
    )
    plan = method.plan(4)
    for i in plan.kept_layers:
        assert plan.layers[i].scale == (1.0 if i in (0, 7) else pytest.approx(3.0))  # 2 of 6
    root = est(shape_of(8), phases=[dict(until=1.0, layers=0.5)], scale=dict(layers="sqrt"))
    scales = [layer.scale for layer in root.plan(0).layers if layer]
    assert scales == pytest.approx([2.0**0.5] * 4)


def test_run_lengths_are_near_equal_or_as_listed():
    assert balance.band_lengths(4, 22) == (6, 6, 5, 5)
    assert balance.band_lengths([6, 5, 5, 6], 22) == (6, 5, 5, 6)
    assert est(shape_of(6)).band_lengths is None
    assert est(shape_of(6), balance_groups=2).band_lengths == (3, 3)
