"""Wrong settings of a method are refused, with the field, the value and what to do."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from cases.plans import PHASES, TINYLLAMA, est, shape_of
from est_ds.errors import UserError
from est_ds.plans.methods import build_method


def phase(**settings) -> dict:
    return dict(phases=[dict(until=1.0, **settings)])


def no_skips(**settings) -> dict:
    return dict(phases=[dict(until=1.0, heads=0.5)], **settings)


WRONG = {
    # settings, and what the message must hold
    "unknown_key": (dict(balanced_groups=2), ["method.balanced_groups", "'balance_groups'"]),
    "unknown_phase_key": (phase(layer=0.5), ["method.phases.0.layer", "'layers'"]),
    "no_phases": (dict(phases=[]), ["method.phases"]),
    "fraction_0": (phase(layers=0.0), ["method.phases.0.layers=0.0", "greater than 0"]),
    "fraction_above_1": (phase(columns=1.5), ["method.phases.0.columns=1.5", "less than or equal"]),
    "not_increasing": (
        dict(phases=[dict(until=50, layers=0.5), dict(until=50), dict(until=100)]),
        ["method.phases[1].until=50", "must increase"],
    ),
    "ends_early": (
        dict(phases=[dict(until=50, layers=0.5), dict(until=90)]),
        ["method.phases[1].until=90", "steps=100", "set it to 100 or 1.0"],
    ),
    "ends_late": (dict(phases=[dict(until=200, layers=0.5)]), ["until=200", "steps=100"]),
    "until_fraction": (dict(phases=[dict(until=1.5)]), ["method.phases[0].until=1.5", "(0, 1]"]),
    "more_runs_than_layers": (
        {**phase(layers=0.5), "balance_groups": 9},
        ["method.balance_groups=9", "1 to 8"],
    ),
    "runs_do_not_add_up": (
        {**phase(layers=0.5), "balance_groups": [4, 5]},
        ["[4, 5]", "8 layers", "not 9"],
    ),
    "empty_run": ({**phase(layers=0.5), "balance_groups": [8, 0]}, ["[8, 0]", "at least 1"]),
    "no_runs": ({**phase(layers=0.5), "balance_groups": []}, ["balance_groups=[]"]),
    "fewer_kept_than_runs": (
        {**phase(layers=0.25), "balance_groups": 4},
        ["layers=0.25 keeps 2 of 8", "at least 4"],
    ),
    "fewer_kept_than_always": (
        {**phase(layers=0.25), "always_keep": [0, 1, 2]},
        ["layers=0.25", "use at least 0.375"],
    ),
    "no_such_layer": (
        {**phase(layers=0.5), "always_keep": [8]},
        ["always_keep holds 8", "-8 to 7"],
    ),
    "no_such_layer_in_phase": (
        phase(layers=0.5, always_keep=[-9]),
        ["method.phases[0].always_keep holds -9"],
    ),
    "unknown_head_rule": (
        {**phase(heads=0.5), "head_rule": "any"},
        ["method.head_rule='any'", "within_groups"],
    ),
    "unknown_scale": (
        {**phase(layers=0.5), "scale": dict(layers="x")},
        ["method.scale.layers='x'"],
    ),
    # Settings that cannot take effect.
    "rounded_layers": (phase(layers=0.99), ["layers=0.99 keeps all 8 of 8", "0.875"]),
    "rounded_heads": (phase(heads=0.9), ["heads=0.9 keeps all 2 heads of a", "0.5"]),
    "lifted_heads": (phase(heads=0.25), ["heads=0.25 keeps none of the 2 heads", "at least 0.5"]),
    "rounded_groups": (
        {**phase(heads=0.9), "head_rule": "groups"},
        ["heads=0.9 keeps all 4 key/value", "0.75"],
    ),
    "rounded_columns": (phase(columns=0.99), ["columns=0.99 keeps all 24 columns"]),
    "idle_scale": (no_skips(scale=dict(layers="inverse")), ["scale.layers=inverse cannot take"]),
    "idle_always_keep": (no_skips(always_keep=[0]), ["method.always_keep=[0] cannot take effect"]),
    "idle_skip": (no_skips(skip="sublayer"), ["method.skip=sublayer cannot take effect"]),
    "idle_head_rule": (
        {**phase(layers=0.5), "head_rule": "groups"},
        ["method.head_rule=groups cannot take"],
    ),
    "idle_counts": (dict(phases=[dict(until=1.0)], counts="bernoulli"), ["counts=bernoulli"]),
    "idle_phase_always_keep": (
        dict(phases=[dict(until=50, layers=0.5), dict(until=100, always_keep=[0])]),
        ["method.phases[1].always_keep=[0] cannot take effect"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_refused_by_name(name):
    settings, parts = WRONG[name]
    with pytest.raises(UserError) as error:
        est(shape_of(8), **settings)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        (dict(name="ets"), ["method.name='ets'", "full, est, raptr", "did you mean 'est'"]),
        (dict(), ["method.name=None"]),
        (dict(name="full", phases=[]), ["unknown key 'method.phases'"]),
        (
            dict(name="raptr", phases=[dict(until=1.0, layers=1)]),
            ["method.phases[0].layers=1 keeps 1 of 4", "use at least 2."],
        ),
        (
            dict(name="raptr", phases=[dict(until=1.0, layers=5)]),
            ["method.phases[0].layers=5", "1 to 4"],
        ),
        (
            dict(name="raptr", phases=[dict(until=1.0, layers=1.5)]),
            ["method.phases.0.layers=1.5", "number of layers", "fraction in (0, 1]"],
        ),
        (dict(name="static", layers=0.5), ["method.until is missing"]),
        (dict(name="static", until=1.0, layers=0.5), ["method.until=1.0", "use 1 to 9"]),
        (dict(name="static", until=0.5), ["cannot take effect", "fraction below 1"]),
        (dict(name="layer_drop", drop=0.0), ["method.drop=0.0", "greater than 0"]),
        (dict(name="layer_drop", drop=1.0), ["method.drop=1.0", "less than 1"]),
        (dict(name="layer_drop", p=0.2), ["unknown key 'method.p'", "drop"]),
        (dict(name="layer_drop", always_keep=[0, 1, 2, -1]), ["names all 4 layers"]),
        (dict(name="pld", theta=0.5), ["unknown key 'method.theta'", "'theta_bar'"]),
        (dict(name="pld", gamma=0), ["method.gamma=0", "greater than 0"]),
        (dict(name="decay_drop", p_max=1.0), ["method.p_max=1.0", "less than 1"]),
        # At step t of 10 the last layer is kept with chance 1 - .99 (1 - t / 9): 1/100, .12, ...
        (dict(name="decay_drop", p_max=0.99), ["more than 20 in 1 of 10 steps", "100", "0.95"]),
        (
            dict(name="decay_drop", p_max=0.999, scale=dict(layers="sqrt")),
            ["by up to 31.6; use at most 0.9975, or method.scale={layers: none}"],
        ),
        (
            dict(name="stacking", phases=[dict(layers=1), dict(until=1.0, layers=4)]),
            ["method.phases.0.until is missing"],
        ),
        (
            dict(name="stacking", alpha=1, phases=[dict(layers=1), dict(until=1.0, layers=4)]),
            ["method: phases[1].until=1.0 cannot take effect beside alpha=1"],
        ),
        (
            dict(
                name="stacking",
                phases=[
                    dict(until=2, layers=0.5),
                    dict(until=4, layers=0.55),
                    dict(until=1.0, layers=1.0),
                ],
            ),
            ["method.phases[1].layers=0.55 (2 layers) is not above 2"],
        ),
    ],
)
def test_wrong_method_is_refused(section, parts):
    with pytest.raises(UserError) as error:
        build_method(section, seed=0, steps=10, shape=shape_of(4))
    assert all(part in str(error.value) for part in parts), error.value


def test_a_step_beyond_the_run_is_refused():
    with pytest.raises(ValueError, match="beyond the last phase"):
        est(shape_of(4)).plan(100)


@pytest.mark.parametrize("step", [0, 300])
def test_a_plan_of_tinyllama_costs_less_than_half_of_sorting_its_keys(step):
    """1.0 ms where all layers are kept and 0.5 ms where half are, on one 2020s server core; a
    quarter of the sorting there, and on slower and busier machines."""
    method = est(TINYLLAMA, steps=1000, phases=PHASES)

    def sort_all_keys(at: int) -> None:
        for layer in range(22):
            for num in (32, 5632):  # its heads and columns
                keys = np.random.Philox(key=0, counter=[0, num, layer, at]).random_raw(num)
                np.sort(np.argsort(keys, kind="stable")[: num // 2])

    def seconds(work: Callable[[int], object]) -> float:
        found = []
        for i in range(60):
            start = time.thread_time()
            work(step + i)
            found.append(time.thread_time() - start)
        return min(found)

    assert seconds(lambda at: method.plan(at).digest) < 0.5 * seconds(sort_all_keys)
