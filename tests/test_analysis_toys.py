"""EST in one short file draws what est_ds draws, and saves what its phases say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from est_ds import cli
from est_ds.analysis import toys
from est_ds.plans.methods import build_method
from est_ds.plans.shape import Mlp, ModelShape

STEPS = 40


def test_its_draws_are_those_of_est_ds():
    shape = ModelShape("toy", ((Mlp(toys.WIDTH, toys.INPUTS, 2),),), toys.INPUTS, 1, None)
    phases = [{"until": until, "columns": share} for until, share in toys.EST]
    method = build_method({"name": "est", "phases": phases}, seed=5, steps=STEPS, shape=shape)
    sizes = set()
    for step in range(STEPS):
        units = toys.kept_units(5, step, toys.fraction_at(toys.EST, step / STEPS))
        kept = method.plan(step).layers[0].parts[0]
        np.testing.assert_array_equal(
            units, range(toys.WIDTH) if kept.units is None else kept.units
        )
        assert kept.scale == toys.WIDTH / len(units)
        sizes.add(len(units))
    assert sizes == {32, 48, 64}


def test_what_is_left_out_is_not_used_and_gets_a_zero_gradient():
    draw = torch.Generator().manual_seed(0)
    sizes = ((toys.WIDTH, toys.INPUTS), (toys.WIDTH,), (toys.WIDTH,), ())
    weights = [torch.randn(s, generator=draw).requires_grad_() for s in sizes]
    kept = torch.tensor([3, 10, 40, 41])
    x = torch.randn(7, toys.INPUTS, generator=draw)
    found = toys.predict(weights, x, kept)
    into, bias, out, last = weights
    hidden = torch.relu(x @ into.T + bias) * torch.zeros(toys.WIDTH).index_fill(0, kept, 16.0)
    torch.testing.assert_close(found, hidden @ out + last)
    found.sum().backward()
    others = [i for i in range(toys.WIDTH) if i not in kept.tolist()]
    assert all((w.grad[others] == 0).all() for w in (into, bias, out)) and into.grad.abs().sum() > 0


def test_it_is_one_short_file_that_knows_nothing_of_est_ds():
    text = Path(toys.__file__).read_text()
    code = [line for line in text.splitlines() if line.strip()]
    assert len(code) <= 60 and "import est_ds" not in text and "from est_ds" not in text


def test_command_compares_at_equal_steps_and_equal_flops(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("est_ds.analysis.toy_results.TOY_STEPS", STEPS)
    cli.main(["analyse", "toy", "--out", str(tmp_path), "--seeds", "2", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["cost"] == (12 * 0.5 + 14 * 0.75 + 14) / 40
    steps = {name: arm["steps"] for name, arm in said["arms"].items()}
    assert steps == {"dense": 40, "EST": 40, "dense, EST's FLOPs": 30}
    assert all(np.shape(arm["errors"]) == (2, 10) for arm in said["arms"].values())
    assert (tmp_path / "toy.png").is_file()
