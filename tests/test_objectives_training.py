"""Objectives through the real launcher: every layout equals one process of plain torch."""

from __future__ import annotations

import pytest
import torch
import yaml

from cases.objectives import BERT, T5
from cases.tiny import TINY_MODEL
from conftest import train
from est_ds.config.run_file import load_run
from est_ds.data.loader import Portion
from est_ds.engine.optimizer import adamw
from est_ds.plans.lr import learning_rate
from est_ds.run.metrics import read_metrics
from est_ds.run.prepare import prepare
from est_ds.slicing.build import build_model
from est_ds.slicing.subnetwork import Subnetwork
from reference import assert_close

STEPS = 6
CASES = {
    "bert": (BERT, {"name": "mlm"}),
    "llama": (
        {**TINY_MODEL, "vocab_size": 560, "hidden_size": 32},
        {"name": "ul2", "mixture": "causal_prefix_span"},
    ),
    "t5": (T5, {"name": "ul2"}),
}
LAYOUTS = {
    "pipe 2 x data 1": ("parallel.pipe=2", "batch.micro=2"),
    "data 2, ZeRO 1": ("parallel.pipe=1", "batch.micro=4"),
}


@pytest.fixture(scope="module")
def run_file(tiny_run, tmp_path_factory):
    def write(case):
        tree = yaml.safe_load(tiny_run.read_text())
        model, objective = CASES[case]
        phases = [{"name": "path", "until": 3, "layers": 3}, {"name": "full", "until": STEPS}]
        tree |= {"model": model, "objective": objective, "steps": STEPS}
        tree["method"] = {"name": "raptr", "phases": phases}
        tree |= {"evaluate": {"every": 3, "sequences": 5}, "schedule": {"name": "cosine"}}
        tree["checkpoint"] = {"every": 2, "keep_last": 0}
        file = tmp_path_factory.mktemp(case) / "run.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    return write


def plain_torch(file, run_dir):
    """Losses and held-out losses: the whole batch at once, cross-entropy over its targets."""
    config = load_run(file, [f"run_dir={run_dir}", "parallel.pipe=1"])
    run = prepare(config, 1)
    torch.set_num_threads(1)
    model = build_model(run.hf_config, config.seed)
    layers = dict(enumerate(run.family.layers(model)))
    subnetwork = Subnetwork(run.family, run.method.shape, layers)
    optimizer = adamw(model.parameters(), config.optimizer)

    def loss(inputs, labels):
        ids = inputs if isinstance(inputs, tuple) else (inputs,)
        logits = model(**dict(zip(("input_ids", "decoder_input_ids"), ids))).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[0].flatten())

    losses, held_out = [], []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.optimizer.lr, step, config.steps)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with subnetwork.active(run.method.plan(step)):
            [batch] = run.train.micro_batches(step, Portion(0, 1, micro=8))
            value = loss(*batch)
            value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
        if (step + 1) % config.evaluate.every == 0:
            [batch] = run.valid["valid"].held_out(5, Portion(0, 1, micro=5))
            with torch.no_grad():
                held_out.append(loss(*batch).item())
    return losses, held_out


def trained(file, run_dir, *overrides):
    done = train(file, f"run_dir={run_dir}", *overrides, processes=2)
    assert done.returncode == 0, done.stderr
    return read_metrics(run_dir)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_layout_equals_one_process_of_plain_torch(case, layout, run_file, tmp_path):
    file = run_file(case)
    expected, expected_held_out = plain_torch(file, tmp_path / "none")
    steps, evaluations = trained(file, tmp_path / "run", *LAYOUTS[layout])
    assert_close([e["loss"] for e in steps], expected)
    assert_close([e["eval_loss"] for e in evaluations], expected_held_out)
    if layout.startswith("pipe"):
        resumed(tmp_path / "run", steps, evaluations)


def resumed(run_dir, steps, evaluations):
    """The run again from its checkpoint after step 2, as if it had been stopped there."""
    (run_dir / "checkpoints" / "latest").write_text("step_00000002\n")
    again = train(run_dir, processes=2)
    assert again.returncode == 0 and "resuming at step 2 of 6" in again.stdout, again.stderr
    kept = ("step", "loss", "grad_norm", "plan_digest", "data_digest")
    steps_again, evaluations_again = read_metrics(run_dir)
    assert [[e[k] for k in kept] for e in steps_again] == [[e[k] for k in kept] for e in steps]
    assert evaluations_again == evaluations


def test_flops_of_an_encoder_decoder_count_the_decoders_own_length(run_file, tmp_path):
    config = load_run(run_file("t5"), [f"run_dir={tmp_path / 'none'}"])
    run = prepare(config, 2)
    assert run.target_sequence == run.train.objective.target_sequence != config.data.sequence
    assert run.flops_size(8) == {
        "tokens": 8 * 64,
        "sequence": 64,
        "target_tokens": 8 * run.target_sequence,
        "target_sequence": run.target_sequence,
    }
