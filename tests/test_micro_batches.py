"""`method.draw: micro_batch`: every micro-batch has its own plan, the same in every layout."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
import yaml

from cases.families import CASES, WITHOUT_ATTENTION, installed, our_model, shape_of, training_of
from cases.methods import SECTIONS
from cases.plans import assert_uniform
from cases.plans import shape_of as plain_shape
from conftest import begun_run, refused
from est_ds.config.run_file import load_run
from est_ds.cost.flops import gradient_share
from est_ds.design import make_design
from est_ds.plans.methods import METHODS as KINDS
from est_ds.plans.methods import build_method
from est_ds.plans.methods.base import Method
from est_ds.plans.plan import Plan
from est_ds.report.plan_text import plan_report
from est_ds.run.metrics import read_metrics
from est_ds.slicing.subnetwork import Turn
from layouts import BF16_BOUND, LAYOUTS, MORE_LAYOUTS, name_of, train_in
from reference import Reference, assert_close, plain_adamw
from workers import start

SIZE = "layers: 0.5, heads: 0.5, columns: 0.5"
METHODS = {
    "est": f"{{name: est, phases: [{{until: 6, {SIZE}}}, {{until: 8}}], draw: micro_batch}}",
    "raptr": "{name: raptr, phases: [{until: 6, layers: 3}, {until: 8}], draw: micro_batch}",
    # Some micro-batches train no layer at all.
    "layer_drop": "{name: layer_drop, drop: 0.8, skip: sublayer, draw: micro_batch}",
}
DRAWN = {n: section for n, section in SECTIONS.items() if KINDS[section["name"]].draws}
EXACT = [n for n in DRAWN if "est" in n[:3] and "bernoulli" not in n or n.startswith("raptr")]
ALL = {**LAYOUTS, **MORE_LAYOUTS}
# And reduce gradients as soon as they fill a bucket.
AT_ONCE = "stage3_param_persistence_threshold: 0, stage3_max_reuse_distance: 0"
GATHER_ALL = f"{{{AT_ONCE}, reduce_bucket_size: 5000}}"
# Thirds are rounded otherwise in bf16 than sixths, one plan a step or many.
BF16 = [n for n in ALL if "ZeRO 0" not in n and "data 3" not in n and n != "1 process"]


def method_of(section: dict, steps: int = 100, seed: int = 7) -> Method:
    own = {**section, "draw": "micro_batch"}
    return build_method(own, seed=seed, steps=steps, shape=plain_shape(8))


# plans


def counts_of(plan: Plan, bands: tuple[int, ...]) -> tuple:
    """Kept layers of every band, for each part, and kept units of every kept part."""
    ends = np.cumsum(bands)[:-1]
    kept = [[bool(layer and layer.parts[p].count) for layer in plan.layers] for p in range(2)]
    units = {tuple(k.count for k in layer.parts if k.count) for layer in plan.layers if layer}
    pairs = {pair for pair in units if len(pair) == 2}
    return [[sum(part) for part in np.split(row, ends)] for row in kept], pairs


@pytest.mark.parametrize("name", EXACT)
def test_exact_counts_are_those_of_the_step_whatever_the_micro_batch(name):
    method = method_of(DRAWN[name])
    bands = method.band_lengths or (8,)
    for step in (0, 1, 2, 49, 50, 99):
        of_step, *others = method.plans(step, 6)
        assert (
            of_step.digest
            == build_method(DRAWN[name], seed=7, steps=100, shape=plain_shape(8)).plan(step).digest
        )
        assert {plan.phase for plan in others} == {of_step.phase}
        layers, units = counts_of(of_step, bands)
        for plan in others:
            own_layers, own_units = counts_of(plan, bands)
            assert own_layers == layers
            assert "sublayer" in name or own_units == units


@pytest.mark.parametrize("name", DRAWN)
def test_plans_of_micro_batches_are_functions_of_their_index(name):
    one, other = method_of(DRAWN[name]), method_of(DRAWN[name])
    plans = one.plans(3, 8)
    assert [other.plan(3, i).digest for i in reversed(range(8))] == [p.digest for p in plans][::-1]
    assert len({plan.digest for plan in plans}) > 1
    assert plans.digest == other.plans(3, 8).digest
    assert plans.digest not in (plans[0].digest, other.plans(3, 7).digest, other.plans(4, 8).digest)
    assert method_of(DRAWN[name], seed=8).plans(3, 8).digest != plans.digest


def test_layers_are_drawn_uniformly_and_apart_from_the_neighbours():
    method = method_of({"name": "est", "phases": [{"until": 1.0, "layers": 0.5}]})
    kept = np.zeros((100, 20, 8))
    for step in range(100):
        for i, plan in enumerate(method.plans(step, 20)):
            kept[step, i, list(plan.kept_layers)] = 1
    assert_uniform(kept.sum((0, 1)), [4] * 2000, 8)
    centred = kept - 0.5
    for apart in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        # Five standard errors of a mean of products of +-.5.
        assert np.abs(apart.mean((0, 1))).max() < 5 * 0.25 / 1900**0.5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_several_micro_batches_under_way_each_have_their_own_plan(checkpointing):
    """As in a pipe stage: forward, forward, backward, backward; and a forward knows its turn."""
    case = CASES["llama"]
    model = our_model(case).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    subnetwork = installed(case, model)
    section = {"phases": [{"until": 1.0, "layers": 0.5, "heads": 0.4, "columns": 0.5}]}
    method = build_method(
        {"name": "est", "draw": "micro_batch", **section}, seed=1, steps=9, shape=shape_of(case)
    )
    ids = torch.arange(36).view(2, 2, 9)

    def loss_of(i: int) -> torch.Tensor:
        return model(input_ids=ids[i], use_cache=False).logits.square().mean()

    for i in range(2):
        with subnetwork.active(method.plan(5, i)):
            loss_of(i).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    turns = []
    model.lm_head.register_forward_hook(lambda *_: turns.append(subnetwork.turn))
    with subnetwork.active(method.plans(5, 2)):
        losses = []
        for i in range(2):
            subnetwork.turn_to(i)
            losses.append(loss_of(i))
        for i in range(2):
            subnetwork.turn_to(i)
            losses[i].backward()
    assert turns == [Turn(5, 0), Turn(5, 1)] and subnetwork.turn is None
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


# what is refused, and what a plan says


@pytest.mark.parametrize("name", ["full", "static", "stacking"])
def test_methods_that_draw_nothing_anew_take_no_plan_a_micro_batch(name, synthetic_run, capsys):
    method = yaml.safe_dump(SECTIONS[name], default_flow_style=True, width=1000).strip()
    error = refused(capsys, "plan", synthetic_run, f"method={method}", "method.draw=micro_batch")
    assert f"method.draw=micro_batch cannot take effect with method.name='{name}'" in error


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["batch.micro=8"], "batch.micro=8 is the whole batch.global=8"),
        (["batch.micro=3"], "is not a multiple of batch.micro=3"),
        (["method={name: est, draw: micro_batch, phases: [{until: 1.0}]}"], "keeps everything"),
        (
            ["deepspeed={zero_optimization: {overlap_comm: true}}"],
            "overlap_comm=True does not work with method.draw=micro_batch below ZeRO 3",
        ),
    ],
)
def test_what_cannot_work_is_refused(overrides, what, synthetic_run, capsys):
    plan = ("plan", synthetic_run, "steps=8", "parallel={}", f"method={METHODS['est']}")
    assert what in refused(capsys, *plan, *overrides)


def test_an_encoder_decoder_under_zero_3_is_refused(synthetic_run, capsys):
    model = training_of({**CASES["t5"].section, "vocab_size": 96})
    method = f"method={METHODS['layer_drop']}"
    error = refused(capsys, "plan", synthetic_run, *model, method, "parallel={zero: 3}")
    assert "parallel.zero=3 does not work with method.draw=micro_batch and model_type 't5'" in error


def test_a_plan_says_which_gradients_a_step_reduces(synthetic_run):
    def said(*more: str) -> str:
        overrides = ["steps=8", f"method={METHODS['est']}", *more]
        return " ".join(plan_report(load_run(synthetic_run, overrides), as_json=False).split())

    text = said()
    # 1 - (1/2)^4 of the layers, whole; and 1/2, of their weights 17 in 30: half of q, o and MLP.
    assert "4 plans a step" in text and "phase_1 0.94 (0.28), phase_2 1.00 (1.00)" in text
    assert "phase_1 0.94 (0.50), phase_2 1.00 (1.00)" in said("parallel={zero: 2}")
    assert "phase_1 1.00 (0.50)" in said("parallel={zero: 3}")
    assert "phase_1 1.00 (1.00)" in said("parallel={zero: 0}")  # DeepSpeed reduces all of them


@pytest.mark.parametrize("name", ["est", "est_sublayer", "layer_drop_balanced", "decay_drop"])
def test_the_share_of_gradients_reduced_is_that_of_the_plans_drawn(name):
    """All layers are alike: a layer counts if any plan of a step keeps a part of it."""
    method = method_of(DRAWN[name], steps=600)
    phase = method.phases[0]
    steps = range(phase.from_step, phase.until_step)
    for count in (2, 5):
        unions = [set().union(*(p.kept_layers for p in method.plans(s, count))) for s in steps]
        shares = [len(union) / 8 for union in unions]
        expected = gradient_share(method, 0, count)
        assert mean(shares) == pytest.approx(expected, abs=5 * np.std(shares) / len(shares) ** 0.5)


# training


def overrides_of(method: str) -> list[str]:
    batch = "batch={global: 12, micro: 2}"
    every = ["checkpoint={every: 4, keep_last: 0}", "evaluate.every=4"]
    return [f"method={METHODS[method]}", "steps=8", batch, *every]


def reference_of(run: Path, folder: Path, overrides: list[str]) -> Reference:
    return plain_adamw(load_run(run, [f"run_dir={folder}/none", "parallel={}", *overrides]))


def compare(run_dir: Path, expected: Reference, within: float = 1e-5) -> None:
    steps, evaluations = read_metrics(run_dir)
    assert_close([e["loss"] for e in steps], expected.losses, within)
    assert_close([e["grad_norm"] for e in steps], expected.norms, max(within, 1e-4) * 10)
    assert_close([e["eval_loss"] for e in evaluations], list(expected.held_out.values()), within)


def check(run: Path, folder: Path, cases: list[tuple[str, str]], *more: str) -> list[Path]:
    """Trains every (layout, method) and compares it with one process of plain torch."""
    of = {m: [*overrides_of(m), *more] for _, m in cases}
    jobs = [(layout, name_of(method), of[method]) for layout, method in cases]
    directories = train_in(folder, run, jobs, 3600)
    expected = {method: reference_of(run, folder, of[method]) for method in of}
    bound = BF16_BOUND if "precision=bf16" in more else 1e-5
    for (_, method), run_dir in zip(cases, directories):
        compare(run_dir, expected[method], bound)
    return directories


def test_zero_2_and_3_and_a_pipeline_train_what_plain_adamw_trains(synthetic_run, tmp_path):
    cases = [("data 2, ZeRO 2", "layer_drop"), ("data 2, ZeRO 3", "est")]
    directories = check(synthetic_run, tmp_path, [*cases, ("pipe 2, checkpointing", "est")])
    run_dir = directories[-1]
    design = make_design(load_run(run_dir))
    for entry in read_metrics(run_dir)[0]:
        plans = design.plans(entry["step"])
        assert entry["plan_digest"] == plans.digest and len(plans) == 6
        assert entry["kept_layers"] == mean(len(plan.kept_layers) for plan in plans)
    # A resumed run, in another layout, goes on the same.
    before = [e["loss"] for e in read_metrics(run_dir)[0]]
    (run_dir / "checkpoints" / "latest").write_text("step_00000004\n")
    arguments = [f"run_dir={run_dir}", "parallel.pipe=1", *overrides_of("est"), "resume=latest"]
    train_in(tmp_path, synthetic_run, [("1 process", "again", arguments)])
    again = read_metrics(run_dir)[0]
    assert [e["start"] for e in again] == [0] * 4 + [4] * 4
    assert_close([e["loss"] for e in again], before)


def test_the_size_of_a_micro_batch_cannot_change_on_resuming(synthetic_run, tmp_path, capsys):
    begun = begun_run(synthetic_run, tmp_path / "run", overrides_of("est"))
    error = refused(capsys, "train", synthetic_run, *begun, "batch.micro=1")
    assert "batch.micro is 2 there and 1 here" in error


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_every_layout_trains_what_plain_adamw_trains(layout, synthetic_run, tmp_path):
    check(synthetic_run, tmp_path, [(layout, method) for method in METHODS])


@pytest.mark.slow
@pytest.mark.parametrize("layout", BF16)
def test_bf16_in_every_layout(layout, synthetic_run, tmp_path):
    check(synthetic_run, tmp_path, [(layout, "est"), (layout, "raptr")], "precision=bf16")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data 2, ZeRO 2", "data 2, ZeRO 3", "pipe 2 x data 2, ZeRO 1"])
def test_what_no_micro_batch_keeps_rests_under_freeze(layout, synthetic_run, tmp_path):
    check(synthetic_run, tmp_path, [(layout, "layer_drop")], "optimizer.inactive=freeze")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    ["data 2, ZeRO 1", "data 2, ZeRO 2", "data 2, ZeRO 3", "pipe 2 x data 2, ZeRO 1"]
    + ["data 2, ZeRO 3, checkpointing"],
)
@pytest.mark.parametrize("compute", ["sliced", "masked"])
def test_every_family_in_every_kind_of_layout(layout, compute, synthetic_run, tmp_path):
    cases, expected = [], []
    families = ("llama", "gpt2", "bert", "qwen3", *WITHOUT_ATTENTION)
    families += ("t5",) if "ZeRO 3" not in layout else ()
    for family in families:
        section = {**CASES[family].section, "vocab_size": 96}
        method = METHODS["layer_drop"].replace("drop: 0.8", f"drop: 0.6, compute: {compute}")
        if family in WITHOUT_ATTENTION:  # a layer has one part
            method = method.replace("skip: sublayer, ", "")
        more = [*training_of(section), f"method={method}", "steps=5", "checkpoint={every: 5}"]
        more.append("evaluate={every: 5, sequences: 12}")
        expected.append(reference_of(synthetic_run, tmp_path, more))
        if "ZeRO 3" in layout:  # else parameters as small as these are gathered once and for all
            more.append(f"deepspeed.zero_optimization={GATHER_ALL}")
        cases.append((layout, family, more))
    for run_dir, wanted in zip(train_in(tmp_path, synthetic_run, cases, 3600), expected):
        compare(run_dir, wanted)


@pytest.mark.slow
def test_a_rank_that_draws_otherwise_is_found(synthetic_run, tmp_path):
    overrides = [f"run_dir={tmp_path}/run", *LAYOUTS["data 2, ZeRO 1"][1], *overrides_of("est")]
    job = {"run": synthetic_run, "overrides": overrides, "odd_from": 5}
    codes, logs = start(tmp_path / "log", 2, [job])
    assert all(codes)
    assert "ranks [1] disagree with rank 0 about the plan of step 5" in "\n".join(logs)
