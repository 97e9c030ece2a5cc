"""`token_drop`: positions skip middle layers as its equation says, in every mask and layout."""

from __future__ import annotations

import numpy as np
import pytest

from cases.families import (
    CASES,
    assert_close,
    installed,
    masked_step,
    our_model,
    run_step,
    shape_of,
    training_of,
)
from cases.plans import GPT2, assert_uniform
from cases.plans import shape_of as plain_shape
from est_ds.config.run_file import load_run
from est_ds.cost.flops import step_flops
from est_ds.errors import UserError
from est_ds.plans.methods import build_method
from est_ds.report.estimate import make_estimate
from est_ds.report.plan_figure import plan_figure
from est_ds.report.plan_text import plan_tables
from est_ds.run.metrics import read_metrics
from layouts import LAYOUTS, MORE_LAYOUTS, train_in
from reference import assert_close as assert_losses_close
from reference import plain_adamw

SECTION = {"name": "token_drop", "start": 0.25, "until": 40}
FAMILIES = ("llama", "gpt2", "bert")


def method_of(shape=None, steps=100, **settings):
    return build_method(SECTION | settings, seed=7, steps=steps, shape=shape or plain_shape(8))


def kept_of(plan) -> list[int | None]:
    return [None if x.positions is None else len(x.positions) for x in plan.layers]


def test_kept_positions_grow_linearly_in_the_middle_layers_until_all_are_kept():
    """8 of 32 at first, and 24 more over 40 steps: 0.6 a step, rounded down."""
    method = method_of()
    for step, kept in ((0, 8), (1, 8), (2, 9), (5, 11), (20, 20), (38, 30), (39, 31)):
        assert kept_of(method.plan(step)) == [None, *[kept] * 6, None]
    assert method.plan(40).is_full and not method.plan(39).is_full
    assert [(p.name, p.until_step) for p in method.phases] == [("token_drop", 40), ("full", 100)]
    assert kept_of(method_of(until=1.0).plan(99)) == [None, *[31] * 6, None]
    assert kept_of(method_of(layers=[0, -3]).plan(0)) == [*[8] * 6, None, None]


def test_every_layer_draws_uniform_positions_of_its_own():
    method = method_of(steps=1000, until=1.0, start=0.5)
    counts, kept = np.zeros((6, 32)), []
    for step in range(1000):
        layers = method.plan(step).layers[1:-1]
        kept.append(len(layers[0].positions))
        for i, layer in enumerate(layers):
            assert layer.positions.dtype == np.int64 and (np.diff(layer.positions) > 0).all()
            counts[i, layer.positions] += 1
        assert len({tuple(layer.positions) for layer in layers}) > 1
    for row in counts:
        assert_uniform(row, kept, 32)


def test_flops_of_a_step_by_hand():
    """GPT-2 of 12 layers, 64 of 1,024 positions in ten of them: a sixteenth of their projections,
    a 256th of their scores."""
    method = build_method(
        {"name": "token_drop", "start": 0.0625, "until": 1.0}, seed=0, steps=100, shape=GPT2
    )
    tokens, width = 1024, 768
    projections, scores = 12 * width**2, 2 * tokens * width  # multiplications of a token
    blocks = 6 * tokens * projections * (2 + 10 / 16)
    rest = 6 * tokens * (scores * (2 + 10 / 256) + width * 50257)
    found = step_flops(GPT2, method.loads(0), tokens=tokens, sequence=tokens)
    assert found.blocks == pytest.approx(blocks, rel=1e-12)
    assert found.model == pytest.approx(blocks + rest, rel=1e-12)


@pytest.mark.parametrize(
    ("family", "separate"), [("mistral_window", False), *((f, True) for f in FAMILIES)]
)
def test_windows_and_documents_are_those_of_the_kept_positions_own_places(family, separate):
    case = CASES[family]
    model, shape = our_model(case), shape_of(case)
    subnetwork = installed(case, model)
    plan = method_of(shape, start=0.5, layers=[0, 2]).plan(3)
    with subnetwork.active(plan):
        ours = run_step(model, case, separate)
    assert_close(ours, masked_step(case, plan, separate))
    whole = run_step(model, case, separate)  # outside, and so in evaluation, the full model
    assert_close(whole, masked_step(case, method_of(shape).plan(99), separate))
    assert abs(whole.loss - ours.loss) > 1e-3


WRONG = {
    "start 0": (dict(start=0.0), "method.start=0.0"),
    "start 1": (dict(start=1.0), "method.start=1.0"),
    "start rounds to all": (dict(start=0.99), "keeps all 32 positions .* at most 0.969"),
    "until 0": (dict(until=0), "method.until=0 is step 0 of steps=100; use 1 to 100"),
    "until late": (dict(until=101), "method.until=101 is step 101 of steps=100"),
    "no such layer": (dict(layers=[1, 8]), "method.layers holds 8: the model has 8 layers"),
    "layers swapped": (dict(layers=[5, 2]), "layers 5 to 2: .* swap them"),
    "three layers": (dict(layers=[1, 2, 3]), "method.layers"),
    "masked": (dict(compute="masked"), ".compute=masked .* use method.compute=sliced"),
    "no middle": (dict(shape=plain_shape(2)), "the model has 2; set method.layers"),
    "t5": (dict(shape=shape_of(CASES["t5"])), "does not work with model.model_type='t5'"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        method_of(**settings)


def test_plan_counts_positions_of_the_runs_own_sequences(synthetic_run):
    """Of 64, though the model takes more."""
    method = "method={name: token_drop, start: 0.25, until: 1.0}"
    estimate = make_estimate(load_run(synthetic_run, [method, "steps=12"]))
    # 16 of 64, and 48 more over 12 steps: 4 a step, in 6 of 8 layers.
    dropped = sum(64 - 16 - 4 * step for step in range(12)) / 12 / 64 * 6 / 8
    assert estimate.json["saved"]["blocks"] == pytest.approx(dropped, rel=1e-12)
    assert "layers 1 to 6 keep 16 of 64" in " ".join(plan_tables(estimate).split())
    *_, line = plan_figure(estimate).axes[0].lines
    assert line.get_label() == "positions"
    # The last step's value stands to the run's end.
    shares = [(2 + 6 * (16 + 4 * step) / 64) / 8 for step in (*range(12), 11)]
    assert line.get_ydata() == pytest.approx(shares)


def overrides_of(family: str, draw: str, documents: str) -> list[str]:
    """Three steps that drop, and one of the full model."""
    section = {**CASES[family].section, "vocab_size": 96}
    return [
        *training_of(section),
        f"method={{name: token_drop, start: 0.3, until: 3, draw: {draw}}}",
        f"data.documents={documents}",
        "steps=4",
        "checkpoint={every: 4}",
        "evaluate={every: 2, sequences: 12}",
    ]


def check(run, folder, layout: str, cases: list[tuple[str, str, str]]) -> None:
    """Trains in a layout, and compares losses in training and on held-out data with plain torch."""
    jobs = [(layout, "_".join(case), overrides_of(*case)) for case in cases]
    for (_, _, overrides), run_dir in zip(jobs, train_in(folder, run, jobs, 3600)):
        expected = plain_adamw(load_run(run, [f"run_dir={folder}/none", "parallel={}", *overrides]))
        steps, evaluations = read_metrics(run_dir)
        assert_losses_close([e["loss"] for e in steps], expected.losses)
        assert_losses_close([e["eval_loss"] for e in evaluations], list(expected.held_out.values()))
        assert [e["flops_active"] < e["flops_dense"] for e in steps] == [True] * 3 + [False]


def test_a_pipeline_trains_what_plain_adamw_trains(synthetic_run, tmp_path):
    check(synthetic_run, tmp_path, "pipe 2, ZeRO 1", [("llama", "micro_batch", "separate")])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE_LAYOUTS])
def test_every_layout_trains_what_plain_adamw_trains(layout, synthetic_run, tmp_path):
    cases = [
        (family, draw, documents)
        for family in FAMILIES
        for draw in ("step", "micro_batch")
        for documents in ("joined", "separate")
    ]
    check(synthetic_run, tmp_path, layout, cases)
