"""Dropout draws its masks by address: the same in every layout, and nothing but what it drops."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cases.families import (
    CASES,
    Step,
    assert_close,
    assert_equal,
    draw_plan,
    inputs_of,
    installed,
    library_model,
    our_model,
    run_step,
    shape_of,
    training_of,
)
from conftest import begun_run, est_ds, refused
from est_ds.config.run_file import load_run
from est_ds.run.metrics import read_metrics
from est_ds.slicing.dropout import address_dropout
from est_ds.slicing.families import family_of
from est_ds.slicing.subnetwork import Subnetwork
from layouts import BF16_BOUND, LAYOUTS, MORE_LAYOUTS, train_in
from reference import assert_close as assert_losses_close
from reference import plain_adamw, seed_masks

RATES = {
    "llama": {"attention_dropout": 0.2},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.3, "attn_pdrop": 0.2},
    "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2},
    "t5": {"dropout_rate": 0.2},
}
RATES |= {name: RATES["llama"] for name in ("mistral", "qwen2", "qwen3")}
DROPPING = {n: replace(CASES[n], section={**CASES[n].section, **r}) for n, r in RATES.items()}
HIDDEN = {
    "gpt2": replace(CASES["gpt2"], section=DROPPING["gpt2"].section | {"attn_pdrop": 0.0}),
    "bert": replace(
        CASES["bert"], section=DROPPING["bert"].section | {"attention_probs_dropout_prob": 0.0}
    ),
}
FAMILIES = [
    pytest.param(n, marks=() if n in ("llama", "gpt2", "bert", "t5") else pytest.mark.slow)
    for n in RATES
]
SEED = 5


def addressed(case, model: nn.Module, seed: int = SEED, masked: bool = False) -> Subnetwork:
    subnetwork = installed(case, model, masked)
    address_dropout(model, family_of(case.section["model_type"]), seed, subnetwork)
    return subnetwork


def step_at(case, subnetwork: Subnetwork, model: nn.Module, plan, micro_batch: int) -> Step:
    with subnetwork.active(plan):
        subnetwork.turn_to(micro_batch)
        return run_step(model, case)


# one process


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_librarys_under_generators_seeded_by_address(family):
    case = DROPPING[family]
    plan = replace(draw_plan(shape_of(case)), step=3)
    theirs = library_model(case)
    seed_masks(theirs, SEED, lambda: (3, 1))
    expected = run_step(theirs, case)
    model = our_model(case)
    subnetwork = addressed(case, model)
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        assert_equal(step_at(case, subnetwork, model, plan, 1), expected)
        assert torch.equal(torch.get_rng_state(), before)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_equal(step_at(case, subnetwork, model, plan, 1), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_dropped_in_evaluation(family):
    case = DROPPING[family]
    model, theirs = our_model(case).eval(), library_model(case).eval()
    subnetwork = addressed(case, model)
    with torch.no_grad(), subnetwork.active(draw_plan(shape_of(case))):
        found = model(**inputs_of(case)).logits
        assert torch.equal(found, theirs(**inputs_of(case)).logits)


def masks_of(case, seed: int, step: int, micro_batch: int) -> dict[str, Tensor]:
    """What every dropout module keeps in a step, by path and call."""
    model, found = our_model(case), {}
    subnetwork = addressed(case, model, seed)

    def note(path: str, rate: float):
        def hook(_module, args, out) -> None:
            kept = out != 0
            # Of 0, as some of what an activation returns, nothing can be told.
            assert torch.allclose(out[kept], (args[0] / (1 - rate))[kept])
            some = found.setdefault(path, [])
            some.append(kept[args[0] != 0])

        return hook

    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(note(path, module.p))
    step_at(case, subnetwork, model, replace(draw_plan(shape_of(case)), step=step), micro_batch)
    return {f"{path} {i}": mask for path, some in found.items() for i, mask in enumerate(some)}


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_masks_differ_by_seed_step_micro_batch_and_place_and_drop_what_the_rate_says(family):
    case = DROPPING[family]
    addresses = [(5, 3, 1), (6, 3, 1), (5, 4, 1), (5, 3, 2)]
    masks = [mask for address in addresses for mask in masks_of(case, *address).values()]
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)
    assert len(masks) == 4 * {"gpt2": 9, "bert": 9, "t5": 4 * 3 + 4 * 4 + 4}[family]
    hidden = {"gpt2": "resid_pdrop", "bert": "hidden_dropout_prob", "t5": "dropout_rate"}[family]
    if family == "gpt2":
        assert_share(torch.cat(masks[::9]), RATES["gpt2"]["embd_pdrop"])
        del masks[::9]
    assert_share(torch.cat(masks), RATES[family][hidden])


def assert_share(kept: Tensor, rate: float) -> None:
    """Within five standard errors."""
    error = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs((~kept).float().mean().item() - rate) < 5 * error


@pytest.mark.parametrize("heads", [None, 5], ids=["all heads", "kept heads"])
def test_attention_probabilities_of_kept_heads_are_dropped_at_the_rate(heads):
    """Equal scores, and values of 1: what attention returns counts what it kept."""
    case = DROPPING["bert"]
    model = our_model(case)
    for layer in model.bert.encoder.layer:
        heads_of = layer.attention.self
        for module in (heads_of.query, heads_of.key, heads_of.value):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, 1.0 if module is heads_of.value else 0.0)
    counts, rate = [], RATES["bert"]["attention_probs_dropout_prob"]
    for layer in model.bert.encoder.layer:
        layer.attention.self.register_forward_hook(lambda _m, _x, out: counts.append(out[0]))
    subnetwork = addressed(case, model)
    for micro_batch in range(4):
        plan = draw_plan(shape_of(case), heads=heads)
        step_at(case, subnetwork, model, plan, micro_batch)
    kept = torch.stack(counts).unflatten(-1, (heads or 12, 2))[..., 0] * 9 * (1 - rate)
    assert torch.allclose(kept, kept.round(), atol=1e-4)
    draws = kept.numel() * 9
    share = 1 - kept.sum().item() / draws
    assert abs(share - rate) < 5 * (rate * (1 - rate) / draws) ** 0.5
    by_head = kept.flatten(0, 1).movedim(-1, 0).flatten(1)
    assert len({row.round().to(torch.int8).numpy().tobytes() for row in by_head}) == (heads or 12)


@pytest.mark.parametrize("family", HIDDEN)
def test_a_sliced_step_drops_of_the_stream_what_the_masked_one_drops(family):
    case = HIDDEN[family]
    plan = draw_plan(shape_of(case), skipped=(1,), without=((2, 0), (3, 1)), heads=5, columns=13)
    steps = []
    for masked in (False, True):
        model = our_model(case)
        steps.append(step_at(case, addressed(case, model, masked=masked), model, plan, 2))
    assert_close(*steps)


# training

EST = "{name: est, phases: [{until: 3, layers: 0.5, heads: 0.5, columns: 0.5}, {until: 5}]}"
ALL = {**LAYOUTS, **MORE_LAYOUTS}


def overrides_of(family: str) -> list[str]:
    section = {**DROPPING[family].section, "vocab_size": 96}
    every = ["checkpoint={every: 2, keep_last: 0}", "evaluate={every: 5, sequences: 12}"]
    return [*training_of(section), f"method={EST}", "steps=5", "seeds={method: 8}", *every]


def losses_of(run_dir) -> list[float]:
    steps, evaluations = read_metrics(run_dir)
    return [e["loss"] for e in steps] + [e["eval_loss"] for e in evaluations]


def check(run, folder, cases: list[tuple[str, str]], *more: str) -> list:
    """Trains every (layout, family) and compares it with one process of plain torch."""
    jobs = [(layout, family, [*overrides_of(family), *more]) for layout, family in cases]
    directories = train_in(folder, run, jobs, 3600)
    expected, bound = {}, BF16_BOUND if "precision=bf16" in more else 1e-5
    for family in {family for _, family in cases}:
        alone = [f"run_dir={folder}/none", "parallel={}", *overrides_of(family), *more]
        found = plain_adamw(load_run(run, alone))
        expected[family] = [*found.losses, *found.held_out.values()]
    for (_, family), run_dir in zip(cases, directories):
        assert_losses_close(losses_of(run_dir), expected[family], bound)
    return directories


def test_zero_3_and_a_pipeline_train_what_plain_adamw_trains(synthetic_run, tmp_path):
    check(synthetic_run, tmp_path, [("data 2, ZeRO 3", "bert"), ("pipe 2, checkpointing", "gpt2")])


def resume(run, folder, run_dir, layout: str, family: str) -> None:
    """Goes on from step 2 in another layout: the same."""
    before = losses_of(run_dir)
    shutil.move(run_dir, run_dir := folder / "again")
    (run_dir / "checkpoints" / "latest").write_text("step_00000002\n")
    arguments = [f"run_dir={run_dir}", *overrides_of(family), "resume=latest"]
    train_in(folder, run, [(layout, "resumed", arguments)])
    assert [e["start"] for e in read_metrics(run_dir)[0]] == [0] * 2 + [2] * 3
    assert_losses_close(losses_of(run_dir), before)


@pytest.mark.slow
@pytest.mark.parametrize("family", RATES)
def test_every_family_in_every_layout(family, synthetic_run, tmp_path):
    directories = check(synthetic_run, tmp_path, [(layout, family) for layout in ALL])
    resume(synthetic_run, tmp_path, directories[1], "pipe 2 x data 2, ZeRO 1", family)


@pytest.mark.slow
def test_bf16_in_every_kind_of_layout(synthetic_run, tmp_path):
    layouts = ["data 2, ZeRO 2", "data 2, ZeRO 3, checkpointing", "pipe 2, checkpointing"]
    cases = [(layout, family) for layout in layouts for family in ("bert", "gpt2")]
    check(synthetic_run, tmp_path, cases, "precision=bf16")


# what is said, and refused


def test_the_size_of_a_micro_batch_cannot_change_on_resuming(synthetic_run, tmp_path, capsys):
    begun = begun_run(synthetic_run, tmp_path / "run", overrides_of("bert"))
    error = refused(capsys, "train", synthetic_run, *begun, "batch.micro=1")
    assert "batch.micro is 2 there and 1 here" in error


def test_a_plan_says_what_drops_also_where_the_run_file_does_not(synthetic_run):
    text = est_ds("plan", synthetic_run, *overrides_of("bert")).stdout
    assert "hidden_dropout_prob 0.1, attention_probs_dropout_prob 0.2" in " ".join(text.split())
    section = "{model_type: gpt2, vocab_size: 96, n_embd: 24, n_layer: 4, n_head: 12}"
    unsaid = [f"model={section}", f"method={EST}", "steps=5", "model.attn_pdrop=0.0"]
    text = est_ds("plan", synthetic_run, *unsaid).stdout
    expected = "resid_pdrop 0.1, embd_pdrop 0.1 (Hugging Face's defaults: resid_pdrop, embd_pdrop)"
    assert expected in " ".join(text.split())
    assert "dropout" not in est_ds("plan", synthetic_run).stdout
