"""What every method keeps to, over one table of settings; and what each draws."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from cases.methods import SECTIONS
from cases.plans import GOLDEN, TINYLLAMA, assert_uniform, digests, shape_of
from est_ds.cost import flops
from est_ds.plans.methods import METHODS, build_method
from est_ds.plans.methods.base import plan_loads

# Stacking may start with fewer layers than runs, or none.
BALANCED = [n for n, s in SECTIONS.items() if s.get("balance_groups") and s["name"] != "stacking"]
every_section = pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())


def method_of(section, *, seed=7, steps=100, shape=None):
    return build_method(section, seed=seed, steps=steps, shape=shape or shape_of(8))


def golden_methods() -> dict:
    return {name: digests(shape_of(8), section) for name, section in SECTIONS.items()}


def test_the_table_holds_every_method():
    assert {section["name"] for section in SECTIONS.values()} == set(METHODS)


def test_digests_are_those_of_the_first_version():
    """A changed digest means that old runs cannot be resumed: say so if it is meant."""
    assert golden_methods() == json.loads((GOLDEN / "methods.json").read_text())


@every_section
def test_plan_is_a_pure_function_of_seed_and_step(section):
    forwards = [method_of(section).plan(s).digest for s in range(0, 100, 9)]
    method = method_of(section)
    assert [method.plan(s).digest for s in reversed(range(0, 100, 9))] == forwards[::-1]
    assert len(set(forwards)) == len(forwards)
    if section["name"] not in ("full", "stacking"):  # these two draw nothing
        other = [method_of(section, seed=8).plan(s).digest for s in range(0, 100, 9)]
        assert other != forwards


@every_section
def test_plans_are_well_formed(section):
    method = method_of(section)
    for step in range(100):
        plan = method.plan(step)
        assert plan.step == step and plan.phase == method.phase_at(step)
        assert len(plan.layers) == 8
        for layer in filter(None, plan.layers):
            assert layer.scale >= 1.0
            assert any(kept.count for kept in layer.parts)
            attention, mlp = layer.parts
            assert (attention.total, mlp.total) == (8, 24)
            for kept, groups in zip(layer.parts, (4, 0)):
                if kept.units is not None:
                    assert kept.units.dtype == np.int64
                    assert (np.diff(kept.units) > 0).all()
                    assert set(kept.units.tolist()) <= set(range(kept.total))
                    assert kept.scale == (kept.total / kept.count if kept.count else 0.0)
                if groups and kept.count:
                    held = (
                        range(4)
                        if kept.key_value_groups is None
                        else kept.key_value_groups.tolist()
                    )
                    units = range(8) if kept.units is None else kept.units
                    owners = [unit // 2 for unit in units]
                    assert {owners.count(g) for g in held} == {kept.count // len(held)}


@every_section
def test_mean_cost_of_drawn_plans_is_the_expected_one(section):
    """Over 800 of 4000 steps, within chance; to the last digit where counts are exact."""
    method = method_of(section, steps=4000)
    dense = flops.dense_flops(method.shape, tokens=1, sequence=16).model
    for i, phase in enumerate(method.phases):
        steps = range(phase.from_step, phase.until_step, 5)
        drawn = [
            flops.step_flops(
                method.shape, plan_loads(method.plan(s), method.shape), tokens=1, sequence=16
            ).model
            for s in steps
        ]
        expected = dense * flops.phase_ratios(method, i, sequence=16).model
        error = max(1e-9, 5 * np.std(drawn) / len(drawn) ** 0.5 / expected)
        assert np.mean(drawn) == pytest.approx(expected, rel=error)


@pytest.mark.parametrize("name", BALANCED)
def test_every_run_keeps_a_layer_or_one_of_each_part(name):
    method = method_of(SECTIONS[name])
    ends = np.cumsum(method.band_lengths)
    for step in range(100):
        plan = method.plan(step)
        for part in range(2):
            runs = {
                int(np.searchsorted(ends, i, side="right"))
                for i, layer in enumerate(plan.layers)
                if layer and layer.parts[part].count
            }
            assert len(runs) == len(ends)


def test_bernoulli_layers_are_kept_on_their_own():
    section = dict(name="est", counts="bernoulli", phases=[dict(until=1.0, layers=0.5)])
    method = method_of(section, steps=3000)
    kept = np.zeros((3000, 8))
    for step in range(3000):
        kept[step, list(method.plan(step).kept_layers)] = 1
    assert np.abs(kept.mean(axis=0) - 0.5).max() < 0.05
    assert np.abs(np.corrcoef(kept.T) - np.eye(8)).max() < 0.1
    assert set(kept.sum(axis=1)) == set(range(9))  # also none, and all


def test_bernoulli_heads_and_columns_keep_at_least_one():
    phase = dict(until=1.0, heads=0.2, columns=0.05)
    method = method_of(dict(name="est", counts="bernoulli", phases=[phase]), steps=1000)
    counts = np.array([[k.count for k in method.plan(s).layers[0].parts] for s in range(1000)])
    assert counts.min(axis=0).tolist() == [4, 1]
    assert len(set(counts[:, 1])) > 3
    # Two heads a group, each with chance 0.2, and one where neither is: 2 * 0.2 + 0.8^2.
    assert counts[:, 0].mean() == pytest.approx(4 * 1.04, abs=0.06)


def test_sublayers_are_skipped_apart_and_exactly():
    method = method_of(dict(name="est", skip="sublayer", phases=[dict(until=1.0, layers=0.5)]))
    mixed = 0
    for step in range(30):
        layers = method.plan(step).layers
        for part in range(2):
            assert sum(bool(layer and layer.parts[part].count) for layer in layers) == 4
        for layer in filter(None, layers):
            attention, mlp = layer.parts
            mixed += not (attention.count and mlp.count)
            if not attention.count:
                assert len(attention.units) == len(attention.key_value_groups) == 0
                assert attention.scale == 0.0
    assert mixed > 30


def test_raptr_keeps_first_and_last_and_a_uniform_path_between():
    phases = [dict(until=1000, layers=4), dict(until=1500, layers=6), dict(until=1.0)]
    method = method_of(dict(name="raptr", phases=phases), steps=2000)
    counts = np.zeros(8)
    for step in range(1000):
        kept = method.plan(step).kept_layers
        assert len(kept) == 4 and kept[0] == 0 and kept[-1] == 7
        counts[list(kept)] += 1
    assert_uniform(counts[1:7], [2] * 1000, 6)
    assert len(method.plan(1200).kept_layers) == 6
    assert method.plan(1500).is_full


def test_static_subnetwork_never_changes_until_the_full_model_starts():
    method = method_of(SECTIONS["static"])
    first, later = method.plan(0), method.plan(49)
    assert first.kept_layers == later.kept_layers and len(first.kept_layers) == 4
    for i in first.kept_layers:
        for a, b in zip(first.layers[i].parts, later.layers[i].parts):
            assert a.units.tolist() == b.units.tolist()
    assert method.plan(50).is_full
    assert [p.name for p in method.phases] == ["static", "full"]


def test_layer_drop_drops_each_layer_at_its_rate():
    method = method_of(dict(name="layer_drop", drop=0.3), steps=3000)
    kept = np.bincount([i for s in range(3000) for i in method.plan(s).kept_layers]) / 3000
    assert np.abs(kept - 0.7).max() < 0.04
    assert {layer.scale for layer in method.plan(0).layers if layer} == {1.0}


def test_pld_follows_its_equation():
    method = method_of(dict(name="pld", theta_bar=0.5, gamma=0.01), steps=500)
    theta = 0.5 * np.exp(-0.01 * 200) + 0.5
    chances = [load.probability for load in method.loads(200)]
    assert chances == pytest.approx([1 - i / 8 * (1 - theta) for i in range(1, 9)])
    assert [load.probability for load in method.loads(0)] == [1.0] * 8
    assert method.plan(0).is_full
    for i, layer in enumerate(method.plan(200).layers):
        assert layer is None or layer.scale == pytest.approx(1 / chances[i])


def test_decay_drop_follows_its_equation():
    method = method_of(dict(name="decay_drop", p_max=0.8), steps=101)
    chances = [load.probability for load in method.loads(25)]
    assert chances == pytest.approx([1 - 0.8 * i / 7 * 0.75 for i in range(8)])
    assert method.plan(100).is_full
    for i, layer in enumerate(method.plan(25).layers):
        assert layer is None or layer.scale == pytest.approx(1 / chances[i])


def test_inverse_scale_leaves_the_expected_output_of_a_layer_unchanged():
    """Chance times scale is 1 for every layer, balanced or not: the lifted chances count."""
    for name in ("layer_drop_balanced", "est_bernoulli_balanced", "pld", "decay_drop"):
        method = method_of(SECTIONS[name], steps=2000)
        outputs = np.zeros(8)
        for step in range(1000):
            for i, layer in enumerate(method.plan(step).layers):
                outputs[i] += 0 if layer is None else layer.scale
        assert np.abs(outputs / 1000 - 1).max() < 0.2, name


def test_mean_loads_of_a_million_steps_take_a_second():
    method = method_of(dict(name="pld", balance_groups=4), steps=10**6, shape=TINYLLAMA)
    start = time.process_time()
    assert 0.7 < flops.phase_ratios(method, 0, sequence=2048).blocks < 0.8
    assert time.process_time() - start < 2.0
