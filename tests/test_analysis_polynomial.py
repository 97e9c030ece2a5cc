"""Errors by degree are exact, arms save what they say, and low degrees come first."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conftest import refused
from est_ds import cli
from est_ds.analysis import polynomial
from est_ds.analysis.polynomial import (
    DEGREES,
    LAYERS,
    SIGNS,
    Network,
    Polynomial,
    learned_after,
    methods,
)
from est_ds.cost.flops import step_flops
from est_ds.plans.methods.base import full_loads, plan_loads


@pytest.fixture(scope="module")
def target():
    return Polynomial(3)


def test_errors_are_those_of_the_degrees_that_are_missing(target):
    labels = target.labels
    assert labels.square().mean().item() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(target.errors(torch.zeros_like(labels)), np.ones(DEGREES))
    np.testing.assert_allclose(target.errors(labels), np.zeros(DEGREES), atol=1e-10)
    np.testing.assert_allclose(target.errors(labels * 0.5), np.full(DEGREES, 0.25), rtol=1e-5)
    # Averaging over the sign of all inputs keeps the even degrees, and takes the odd ones away.
    assert torch.equal(target.inputs.flip(0), -target.inputs)
    even = (labels + labels.flip(0)) / 2
    np.testing.assert_allclose(target.errors(even), [1.0, 0.0] * (DEGREES // 2), atol=1e-6)
    # What no term of the target is, is no error of a degree.
    everything = target.inputs.prod(1)  # degree 12
    np.testing.assert_allclose(target.errors(labels + everything), np.zeros(DEGREES), atol=1e-6)


def test_raptr_and_pld_run_a_fifth_fewer_layers():
    steps = 2000
    for arm, method in methods(steps, 16, seed=1).items():
        plans = [method.plan(step) for step in range(steps)]
        share = np.mean([len(plan.kept_layers) for plan in plans]) / LAYERS
        assert share == pytest.approx(1.0 if arm == "dense" else 0.8, abs=0.005), arm
        if arm == "RaPTr":
            assert all({0, LAYERS - 1} <= set(plan.kept_layers) for plan in plans)
            size = {"tokens": 1, "sequence": 1}
            shape, some = method.shape, plans[0]
            kept, full = (
                step_flops(shape, loads, **size).blocks
                for loads in (plan_loads(some, shape), full_loads(shape))
            )
            assert kept / full == 12 / 20


def test_a_plan_leaves_layers_out_and_scales_the_others():
    network = Network(8, seed=0)
    x = torch.randn(5, SIGNS, generator=torch.Generator().manual_seed(0))
    plan = methods(100, 8, seed=0)["PLD"].plan(60)
    kept = plan.kept_layers
    assert 0 < len(kept) < LAYERS and plan.layers[kept[-1]].scale > 1
    y = x @ network.first.T
    for i in kept:
        normed = y / (y.square().mean(1, keepdim=True) + torch.finfo().eps).sqrt()
        hidden = (normed @ network.into[i].T + network.biases[i]).clamp(min=0)
        y = y + plan.layers[i].scale * hidden @ network.out[i].T
    normed = y / (y.square().mean(1, keepdim=True) + torch.finfo().eps).sqrt()
    torch.testing.assert_close(network(x, plan), normed @ network.last)


def test_a_degree_is_learned_where_its_error_stays_below_a_half():
    runs = [
        {"done": [10, 20, 30], "errors": [[0.6, 0.2, 0.9], [0.4, 0.7, 0.9], [0.1, 0.3, 0.6]]},
        {"done": [10, 20, 30], "errors": [[0.6, 0.2, 0.9], [0.4, 0.7, 0.9], [0.1, 0.3, 0.6]]},
    ]
    assert learned_after(runs) == [20, 30, None]


def test_command_learns_low_degrees_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(polynomial, "EVALUATIONS", 5)
    few = ("--steps", "100", "--width", "24", "--out", str(tmp_path))
    cli.main(["analyse", "polynomial", "--json", *few])
    said = json.loads(capsys.readouterr().out)
    assert said["arms"].keys() == {"dense", "RaPTr", "PLD"}
    errors = said["arms"]["dense"]["errors"]
    assert errors[0] < 0.5 < min(errors[3:])
    assert (tmp_path / "polynomial.png").is_file()
    assert len(said["arms"]["PLD"]["runs"][0]["done"]) == polynomial.EVALUATIONS
    assert "--steps=7 is not allowed" in refused(capsys, "analyse", "polynomial", "--steps", "7")
