"""Losses of every held-out window, and of both sides of a phase boundary, against plain models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from est_ds.checkpoints.reader import Checkpoint
from est_ds.config.run_file import load_run
from est_ds.data.loader import Portion
from est_ds.run.metrics import read_boundaries, read_metrics
from est_ds.run.prepare import prepare
from est_ds.run.windows import read_windows, windows_file
from est_ds.slicing.build import build_model
from est_ds.training.boundaries import is_boundary
from layouts import LAYOUTS, MORE_LAYOUTS, name_of, train_in

SEQUENCES = 51  # micro-batches of 2 on 2 or 3 replicas: the last ones are filled up
EST = (
    "{name: est, balance_groups: 4, phases: ["
    "{name: small, until: 2, layers: 0.5, heads: 0.5, columns: 0.5}, "
    "{name: narrow, until: 4, heads: 0.5, columns: 0.5}, {name: full, until: 6}]}"
)
GROWS = "{name: stacking, mode: identity, phases: [{until: 3, layers: 2}, {until: 6, layers: 8}]}"
BATCH = "batch={global: 12, micro: 2}"  # for 3 replicas too
COMMON = ["steps=6", BATCH, "schedule={name: cosine}", f"evaluate.sequences={SEQUENCES}"]
WINDOWS = [*COMMON, f"method={EST}", "data.documents=separate"]
WINDOWS += ["evaluate.windows=true", "evaluate.every=3"]
BOUNDARIES = [*COMMON, "evaluate.boundaries=true", "evaluate.every=3"]
FAST = ["data 2, ZeRO 1", "data 2, ZeRO 3", "pipe 2, ZeRO 1"]
ALL = sorted({**LAYOUTS, **MORE_LAYOUTS})
CASES = [(layout, "windows", WINDOWS) for layout in FAST]
CASES += [("pipe 2, ZeRO 1", "sampled", [*BOUNDARIES, f"method={EST}"])]
CASES += [("data 2, ZeRO 1", "grown", [*BOUNDARIES, f"method={GROWS}"])]


@pytest.fixture(scope="module")
def trained(synthetic_run, tmp_path_factory) -> Path:
    """The folder with a run of each of `CASES`."""
    folder = tmp_path_factory.mktemp("held_out")
    train_in(folder, synthetic_run, CASES)
    return folder


def plain_model(run_dir: Path, done: int):
    """The run, and the library's own model with the weights after some steps."""
    run = prepare(load_run(run_dir, ["parallel={}"]), 1)
    model = build_model(run.hf_config, seed=0).eval()
    with Checkpoint(run_dir / "checkpoints" / f"step_{done:08d}") as held:
        model.load_state_dict(held.weights())
    return run, model


@torch.no_grad()
def plain_losses(run, model) -> tuple[list[float], list[int]]:
    """Of every window: the mean over its targets, and their number."""
    torch.set_num_threads(1)
    [(inputs, labels)] = run.valid["valid"].held_out(SEQUENCES, Portion(0, 1, micro=SEQUENCES))
    ids = inputs if isinstance(inputs, tuple) else (inputs,)
    labels = labels[0] if isinstance(labels, tuple) else labels
    logits = model(**run.family.named_inputs(ids), use_cache=False).logits
    losses = [cross_entropy(*row).item() for row in zip(logits, labels)]
    return losses, (labels != -100).sum(1).tolist()


def check_windows(run_dir: Path) -> None:
    _, evaluations = read_metrics(run_dir)
    assert [e["step"] for e in evaluations] == [2, 5]
    for line in evaluations:
        found = read_windows(windows_file(run_dir, line["step"] + 1))["valid"]
        assert found.mean == pytest.approx(line["eval_loss"], rel=1e-6)
    run, model = plain_model(run_dir, 6)
    losses, targets = plain_losses(run, model)
    assert found.losses == pytest.approx(np.array(losses), rel=1e-5)
    assert found.targets.tolist() == targets and len(set(targets)) > 1
    assert found.windows.tolist() == run.valid["valid"].held_out_samples(SEQUENCES)
    assert not list(run_dir.rglob("*.partial"))


@pytest.mark.parametrize("layout", FAST)
def test_losses_of_windows_are_those_of_a_plain_model(layout, trained):
    check_windows(trained / name_of(layout, "windows"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in ALL if name not in FAST])
def test_losses_of_windows_in_every_layout_are_those_of_a_plain_model(
    layout, synthetic_run, tmp_path
):
    check_windows(train_in(tmp_path, synthetic_run, [(layout, "windows", WINDOWS)])[0])


@torch.no_grad()
def only(model, plan) -> None:
    """Leaves of a plain Llama what a plan keeps: other layers go, other heads and columns get no
    weight, and the kept ones n / k of theirs."""
    width = model.config.hidden_size // model.config.num_attention_heads
    for i, layer in enumerate(model.model.layers):
        if plan.layers[i] is None:
            continue
        for kept, linear, size in zip(
            plan.layers[i].parts, (layer.self_attn.o_proj, layer.mlp.down_proj), (width, 1)
        ):
            if kept.units is not None:
                factors = torch.zeros(kept.total)
                factors[torch.from_numpy(kept.units)] = kept.total / len(kept.units)
                linear.weight *= factors.repeat_interleave(size)
    layers = [layer for i, layer in enumerate(model.model.layers) if plan.layers[i] is not None]
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)


def test_losses_at_boundaries_are_those_of_plain_models_that_keep_what_the_plans_do(trained):
    run_dir = trained / name_of("pipe 2, ZeRO 1", "sampled")
    lines = read_boundaries(run_dir)
    sides = [(2, "before", "small"), (2, "after", "narrow")]
    sides += [(4, "before", "narrow"), (4, "after", "full")]
    assert [(e["step"], e["boundary"], e["phase"]) for e in lines] == sides
    for line, steps in zip(lines, ([0, 1], [2, 3], [2, 3], [4, 5])):
        each = []
        for step in steps:
            run, model = plain_model(run_dir, line["step"])
            full = np.mean(plain_losses(run, model)[0])
            assert line["full_loss"] == pytest.approx(full, rel=1e-5)
            only(model, run.method.plan(step))
            each.append(np.mean(plain_losses(run, model)[0]))
        assert line["subnetwork_loss"] == pytest.approx(np.mean(each), rel=1e-5)
        assert line["plans"] == 2
    assert lines[-1]["subnetwork_loss"] == lines[-1]["full_loss"] != lines[0]["subnetwork_loss"]
    losses = [e["loss"] for e in read_metrics(run_dir)[0]]
    assert len(losses) == 6 and all(np.isfinite(losses))


def test_a_model_is_evaluated_before_and_after_it_grows(trained):
    """New layers that compute the identity change nothing."""
    run_dir = trained / name_of("data 2, ZeRO 1", "grown")
    before, after = read_boundaries(run_dir)
    assert (before["phase"], after["phase"]) == ("depth_2", "depth_8")
    [then, _] = read_metrics(run_dir)[1]
    assert before["full_loss"] == before["subnetwork_loss"] == then["eval_loss"]
    assert after["full_loss"] == after["subnetwork_loss"]
    assert after["full_loss"] == pytest.approx(before["full_loss"], rel=1e-6)


def test_a_method_of_one_phase_has_no_boundary(synthetic_run):
    config = load_run(synthetic_run, ["method={name: full}", "evaluate.boundaries=true"])
    run = prepare(config, 4)
    assert not any(is_boundary(run, step) for step in range(config.steps))
