"""Draws of gradients: against all subnetworks of a small model, masked by hand, one by one."""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations, product

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from cases.tiny import make_config
from conftest import refused
from est_ds import cli
from est_ds.analysis.dropout import Draws, drawn_phases, measure_draws
from est_ds.analysis.moments import moments_of, statistics
from est_ds.design import make_design
from est_ds.slicing.build import build_model
from est_ds.studies.compare import Wish, open_study
from est_ds.studies.page import render
from est_ds.studies.snapshot import Snapshot
from made_studies import DENSE, LAYERS, result_of
from subjects import LLAMA, SEQUENCE, VOCABULARY

DOWN = "model.layers.0.mlp.down_proj.weight"
ONE_LAYER = LLAMA | {"num_hidden_layers": 1}
COLUMNS = ONE_LAYER["intermediate_size"]


# the estimator


def test_estimates_are_right_on_average_over_all_samples():
    """Every sample of four of three equally likely gradients: their mean has no bias."""
    full = torch.tensor([1.0, 2.0])
    known = torch.tensor([[2.0, 2.0], [1.0, -1.0], [0.0, 4.0]])
    found = [statistics([moments_of(full, known[list(s)])]) for s in product(range(3), repeat=4)]
    mean = known.mean(0)
    bias, variance = ((mean - full) ** 2).sum() / 5, ((known - mean) ** 2).sum(1).mean() / 5
    assert np.mean([f.bias_squared.value for f in found]) == pytest.approx(bias.item(), abs=1e-6)
    assert np.mean([f.variance.value for f in found]) == pytest.approx(variance.item(), rel=1e-6)


def test_two_opposite_draws_have_no_bias_and_the_square_of_their_distance_as_variance():
    full, away = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    found = statistics([moments_of(full, [full + away, full - away] * 32)])
    assert found.bias_squared.value == pytest.approx(-9 / 4 / 63)  # 0 but for the sample
    assert found.variance.value == pytest.approx(9 / 4 * 64 / 63)
    assert found.bias == 0.0


# a model whose subnetworks can all be listed


def design_of(draw: str = "step", compute: str = "sliced", **changes):
    phases = [{"until": 0.5, "columns": 0.5}, {"until": 1.0}]
    method = {"name": "est", "phases": phases, "draw": draw, "compute": compute}
    data = {name: "absent" for name in ("train", "valid", "tokenizer")} | {"sequence": 8}
    return make_design(
        make_config(**{"model": ONE_LAYER, "method": method, "data": data, "steps": 400} | changes)
    )


@pytest.fixture(scope="module")
def case():
    """Weights, two micro-batches, and the library's loss and gradient [P] with some columns."""
    model = build_model(design_of().hf_config, 0)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=draw)
    weights = {name: part.detach() for name, part in model.named_parameters()}
    batch = [
        tuple(torch.randint(VOCABULARY, (2, SEQUENCE), generator=draw) for _ in range(2))
        for _ in range(2)
    ]

    @cache
    def by_hand(factors: tuple[float, ...], number: int) -> tuple[float, np.ndarray]:
        ids, labels = batch[number]
        own = {name: part.clone().requires_grad_() for name, part in weights.items()}
        used = own | {DOWN: own[DOWN] * torch.tensor(factors, dtype=torch.float32)}
        logits = functional_call(model, used, kwargs={"input_ids": ids}).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        parts = torch.autograd.grad(loss, list(own.values()))
        return loss.item(), torch.cat([part.flatten() for part in parts]).double().numpy()

    return model.state_dict(), batch, by_hand


EVERY = (1.0,) * COLUMNS
BOTH = range(2)


def subnetworks(scale: float) -> list[tuple[float, ...]]:
    """The factors of all columns, for every half of them."""
    halves = combinations(range(COLUMNS), COLUMNS // 2)
    return [tuple(scale * (i in kept) for i in range(COLUMNS)) for kept in halves]


def exact(case, draw: str) -> dict[str, float]:
    """Bias, variance and cosine over all subnetworks; those of micro-batches are independent."""
    by_hand = case[-1]
    full = np.mean([by_hand(EVERY, micro)[1] for micro in BOTH], axis=0)
    each = np.array([[by_hand(f, micro)[1] for f in subnetworks(2.0)] for micro in BOTH])
    mean = each.mean((0, 1))
    if draw == "step":
        variance = ((each.mean(0) - mean) ** 2).sum(1).mean()
    else:
        apart = each - each.mean(1, keepdims=True)
        variance = (apart**2).sum(2).mean(1).sum() / len(BOTH) ** 2
    size = full @ full
    return {
        "bias_squared": ((mean - full) @ (mean - full)) / size,
        "variance": variance / size,
        "cosine": mean @ full / np.sqrt(size * (mean @ mean)),
    }


def exact_excess(case, scale: float) -> float:
    by_hand = case[-1]
    full = np.mean([by_hand(EVERY, micro)[0] for micro in BOTH])
    return np.mean([by_hand(f, micro)[0] for f in subnetworks(scale) for micro in BOTH]) - full


def assert_near(found: dict[str, float], value: float, least: float) -> None:
    """Within four standard errors, which are no larger than a part of what is told."""
    error = found["standard_error"]
    assert abs(found["value"] - value) < 4 * error
    assert error < least


@pytest.mark.parametrize("draw", ["step", "micro_batch"])
def test_draws_estimate_what_all_subnetworks_give(draw, case):
    weights, batch, _ = case
    design = design_of(draw, batch={"global": 4, "micro": 2})
    [drawn] = drawn_phases(design, 60, "it")
    assert len(drawn.steps) == len(set(drawn.steps)) == 60 and drawn.steps[-1] < 200
    [found] = measure_draws(design, weights, [batch], [drawn])
    for name, value in exact(case, draw).items():
        assert_near(found["gradient"][name], value, 0.15)
    bias = found["gradient"]["bias"]
    assert bias == pytest.approx(max(0.0, found["gradient"]["bias_squared"]["value"]) ** 0.5)
    assert_near(found["regularisation"], exact_excess(case, 2.0), 0.05)
    assert_near(found["regularisation_without_scale"], exact_excess(case, 1.0), 0.05)


def test_a_masked_twin_has_the_moments_of_the_sliced_one(case):
    weights, batch, _ = case
    twins = []
    for compute in ("sliced", "masked"):
        design = design_of(compute=compute)
        [found] = measure_draws(design, weights, [batch], drawn_phases(design, 8, "it"))
        assert found.pop("compute") == compute
        twins.append(found)
    assert_same(*twins)


def assert_same(one, other) -> None:
    """But for rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    else:
        assert one == other


def test_the_full_model_drops_nothing_and_a_step_drops_what_its_address_says(case):
    weights, batch, by_hand = case
    section = ONE_LAYER | {"attention_dropout": 0.5}
    design = design_of(model=section, method={"name": "full"}, batch={"global": 4, "micro": 2})
    draws = Draws(design, weights)
    known = [by_hand(EVERY, micro) for micro in BOTH]
    loss, gradient = draws.full(batch)
    assert loss == pytest.approx(np.mean([loss for loss, _ in known]), rel=1e-5)
    np.testing.assert_allclose(gradient, np.mean([g for _, g in known], axis=0), atol=1e-5)
    first, again, other = (draws.drawn(design.plans(s), batch)[0] for s in (3, 3, 4))
    assert first == again and len({first, other, loss}) == 3


def test_phases_that_draw_nothing_or_have_no_full_model_are_left_out(capsys):
    assert [drawn.phase.until_step for drawn in drawn_phases(design_of(), 8, "it")] == [200]
    grow = [{"until": 0.5, "layers": 2}, {"until": 1.0, "layers": 4}]
    stacking = {"name": "stacking", "mode": "gradual", "phases": grow}
    assert not drawn_phases(make_design(make_config(method=stacking)), 8, "it")
    assert not drawn_phases(make_design(make_config(method={"name": "full"})), 8, "it")


# the command


@pytest.fixture
def study(write_study):
    """Of 40 steps, with a twin that is masked and one that draws for every micro-batch."""
    arms = {"dense": DENSE, "layers": {"method": LAYERS}}
    arms["layers_masked"] = {"method": {**LAYERS, "compute": "masked"}}
    arms["layers_often"] = {"method": {**LAYERS, "draw": "micro_batch"}}
    at = {"parallel": {"pipe": 1, "processes": 1}, "checkpoint.every": 20}
    return write_study(arms=arms, set={"steps": 40, **at}, seeds=[0, 1], budgets=["tokens"])


LOSSES = {"dense": 3.0, "layers": 3.25, "layers_masked": 3.25, "layers_often": 3.125}
FEW = ("--draws", "8", "--batches", "1")


def test_command_says_what_compare_says_and_measures_at_the_first_weights(study, capsys):
    session = open_study(str(study), Wish())
    session.results.begin(session.header)
    for run in session.wanted().runs:
        session.results.add(result_of(run, LOSSES[run.arm] + 0.01 * run.seed * len(run.arm)))
    cli.main(["analyse", "dropout", str(study), *FEW, "--json"])
    said = json.loads(capsys.readouterr().out)
    layers, masked, often = (said["arms"][name] for name in list(LOSSES)[1:])
    for one, other in zip(layers, masked, strict=True):
        assert_same(one, {**other, "compute": "sliced"})
    assert [p["draw"] for p in (*layers, *often)] == ["step", "micro_batch"]
    assert said["left_out"] == {"dense": "it draws nothing of a whole model"}
    assert (said["step"], said["sequences"]) == (0, 8)
    alike = {pair["arm"]: pair for pair in said["alike"]}
    assert {name: pair["like"] for name, pair in alike.items()} == {
        "layers_masked": "layers",
        "layers_often": "layers",
    }
    assert alike["layers_often"]["differs"] == {"draw": "micro_batch"}
    apart = alike["layers_often"]["difference"]["interval"]["mean"]
    assert apart == pytest.approx(-0.125 + 0.01 * 6 / 2)
    arms = said["compare"]["arms"]
    assert arms["layers"]["losses"] == {"0": 3.25, "1": 3.25 + 0.06}
    assert "At equal tokens" in said["said"][1]
    folder = study.parent / "study" / "analysis"
    [picture] = folder.glob("*.png")
    assert said == json.loads(picture.with_suffix(".json").read_text())
    page = render(Snapshot(session.runs, session.answers(), session.results))
    assert "<h2>Analyses</h2>" in page and said["title"] in page


def test_command_measures_at_a_checkpoint_of_any_run_of_the_model(study, trained, capsys):
    cli.main(["analyse", "dropout", str(study), *FEW, "--run", str(trained), "--step", "10"])
    said = capsys.readouterr().out
    assert f"the weights of {trained} after 10 steps" in said
    assert "No run of the study is done yet" in said


def test_command_refuses_what_it_cannot_measure(study, write_study, tiny_run, capsys, tmp_path):
    def refusal(*more: str) -> str:
        return refused(capsys, "analyse", "dropout", study, *more)

    assert "--draws=4 is not allowed: the standard errors need at least 8" in refusal(
        "--draws", "4"
    )
    assert "phase 'phase_1' of arm layers has 20 steps" in refusal("--draws", "21")
    assert "has no checkpoint; train it" in refusal("--step", "20")
    assert "no_such" in refusal("--run", "no_such")
    other = tmp_path / "other.yaml"
    other.write_text(tiny_run.read_text().replace("hidden_size: 64", "hidden_size: 32"))
    assert "other parameters than the baseline" in refusal("--run", other, "--step", "first")
    write_study(arms={"dense": DENSE, "slow": {**DENSE, "optimizer.lr": 1e-4}})
    assert "no arm of the study draws anything" in refusal()
    assert not (study.parent / "study").exists()
