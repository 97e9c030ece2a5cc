"""Attention of every document by itself: equal to the masked one, in every model and subnetwork."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from cases.corpora import write_corpus
from cases.families import CASES, draw_plan
from cases.memory import GPT2, TOKENS
from cases.tiny import TINY_MODEL, make_config
from est_ds.config.run_file import load_run
from est_ds.data.loader import Portion
from est_ds.design import make_outline
from est_ds.report.plan_memory import subject_of
from est_ds.run.metrics import read_metrics
from est_ds.run.prepare import prepare
from est_ds.slicing import documents
from est_ds.slicing.build import build_model
from est_ds.slicing.documents import (
    TOGETHER,
    Documents,
    attend_by_document,
    attention,
    numbers_of,
)
from est_ds.slicing.families import family_of, hf_config
from est_ds.slicing.subnetwork import Subnetwork
from layouts import LAYOUTS, MORE_LAYOUTS, train_in
from reference import assert_close as assert_losses_close
from reference import plain_adamw

SCORES_OF_CALL, SEQUENCE = documents.SCORES_OF_CALL, 150
# A document as long as the sequence, one of a single position, and more short ones than a call
# takes, in a row that they do not fill.
LENGTHS = [[70, 1, 1, 12, 3, 63], [150], [1, 2] * 30 + [60], [9] * 16 + [6]]
MODELS = ("llama", "mistral", "mistral_window", "qwen2", "qwen3", "gpt2", "bert")


@pytest.fixture(autouse=True)
def never_masked(monkeypatch):
    """As in larger models: these are so small that masks would be faster."""
    monkeypatch.setattr(documents, "SCORES_OF_CALL", 0)


def positions_of(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


class Model:
    """A model of the table that takes longer sequences, and what its shape is."""

    def __init__(self, case: str, **fields) -> None:
        section = dict(CASES[case].section) | fields
        length = "n_positions" if section["model_type"] == "gpt2" else "max_position_embeddings"
        config = hf_config(section | {length: SEQUENCE})
        self.family, self.config = family_of(section["model_type"]), config
        self.shape, self.vocabulary = self.family.shape(config), section["vocab_size"]
        torch.manual_seed(0)
        self.masked = build_model(config, 0)
        for parameter in self.masked.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        self.apart = copy.deepcopy(self.masked)
        attend_by_document(self.apart)

    def step(self, model, in_pieces: bool = False, plan=None, dtype=torch.float32):
        """Loss and gradients; in pieces as a pipeline computes them."""
        model = model.to(dtype)
        model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(3)
        shape = (len(LENGTHS), SEQUENCE)
        ids, labels = (torch.randint(self.vocabulary, shape, generator=generator) for _ in "ab")
        x = ids, positions_of(LENGTHS)
        layers = dict(enumerate(self.family.layers(model)))
        subnetwork = None if plan is None else Subnetwork(self.family, self.shape, layers)
        with nullcontext() if plan is None else subnetwork.active(plan):
            if in_pieces:
                for piece in self.family.pieces(self.config):
                    x = piece.forward(*(model.get_submodule(path) for path in piece.modules), x)
            else:
                named = self.family.named_inputs(x, model.config)
                cache = {} if self.config.model_type == "bert" else {"use_cache": False}
                x = model(**named, **cache).logits
            loss = cross_entropy(x.flatten(0, 1).float(), labels.flatten())
            loss.backward()
        if subnetwork:
            subnetwork.uninstall()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_equal_steps(ours, theirs, loss: float = 1e-6, gradients: float = 1e-5) -> None:
    """Losses and gradients; a gradient's error over its largest entry, or over 1."""
    assert abs(ours[0] - theirs[0]) <= loss * abs(theirs[0])
    for name, expected in theirs[1].items():
        assert (expected is None) == (ours[1][name] is None), name
        if expected is not None:
            error = (ours[1][name] - expected).abs().max()
            assert error <= gradients * max(1.0, expected.abs().max()), f"{name}: {error:.2e}"


# A window in all layers but the first.
SOME_WINDOWS = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)


@pytest.fixture(scope="module", params=[*MODELS, "qwen2_windows"])
def model(request):
    if request.param == "qwen2_windows":
        return Model("qwen2", **SOME_WINDOWS)
    return Model(request.param)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_loss_and_gradients_are_the_masked_ones(model, in_pieces):
    ours, theirs = model.step(model.apart, in_pieces), model.step(model.masked, in_pieces)
    assert model.masked.config._attn_implementation == "sdpa"
    assert_equal_steps(ours, theirs)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_recomputed_layers_give_the_same(in_pieces):
    model = Model("llama")
    theirs = model.step(model.masked)
    model.apart.train().activation_checkpointing_enable({"use_reentrant": False})
    assert_equal_steps(model.step(model.apart, in_pieces), theirs)


PLANS = {
    "heads": dict(heads=1, columns=20),
    "groups": dict(heads=2, rule="groups", skipped=(1,)),
    "without attention": dict(without=((2, 0),), heads=2),
    "positions": dict(positions=60),
}


@pytest.mark.parametrize("case", ["llama", "qwen3", "gpt2", "bert"])
@pytest.mark.parametrize("kept", PLANS)
def test_subnetworks_give_what_they_give_under_masks(case, kept):
    model = Model(case)
    plan = draw_plan(replace(model.shape, sequence=SEQUENCE), **PLANS[kept])
    ours, theirs = (model.step(m, plan=plan) for m in (model.apart, model.masked))
    assert_equal_steps(ours, theirs)
    assert abs(ours[0] - model.step(model.masked)[0]) > 1e-4  # the plan is no whole model


def test_in_bf16_losses_are_within_its_rounding():
    model = Model("llama")
    ours, theirs = (model.step(m, dtype=torch.bfloat16) for m in (model.apart, model.masked))
    assert_equal_steps(ours, theirs, loss=1e-3, gradients=2e-2)


class Scores(TorchDispatchMode):
    """Counts the scores that calls of SDPA compute, of one head."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.count += args[0].shape[0] * args[0].shape[2] * args[1].shape[2]
        return func(*args, **(kwargs or {}))


def test_scores_between_documents_are_not_computed():
    """But for those of short neighbours."""
    model = Model("gpt2")
    with Scores() as ours:
        model.step(model.apart)
    with Scores() as theirs:
        model.step(model.masked)
    own = sum(max(n * n, n * TOGETHER) for row in LENGTHS for n in row)
    layers = model.shape.num_layers
    assert theirs.count == layers * len(LENGTHS) * SEQUENCE**2
    assert layers * SEQUENCE**2 < ours.count <= layers * own < 0.6 * theirs.count


def test_small_sequences_are_masked_where_that_is_faster(monkeypatch):
    """Eight documents, as eight calls and as masked scores, in one thread."""
    monkeypatch.setattr(documents, "SCORES_OF_CALL", SCORES_OF_CALL)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for length, heads, masked in ((70, 4, True), (250, 4, False), (150, 1, True), (70, 64, False)):
        rows = Documents(numbers_of(positions_of([[length]] * 8))[:, 0, :, 0])
        assert len(rows.stretches) == 8
        assert rows.masked_is_faster(heads) == masked == (8 * length**2 * heads < 8 * 30_000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for case in ("llama", "mistral_window", "bert"):
        model = Model(case)
        with Scores() as ours:
            step = model.step(model.apart)
        assert ours.count == model.shape.num_layers * len(LENGTHS) * SEQUENCE**2
        assert_equal_steps(step, model.step(model.masked), loss=0, gradients=0)


def test_bounds_and_stretches_cover_every_document_once():
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = []
        for _ in range(rng.integers(1, 5)):
            cuts = np.sort(rng.choice(np.arange(1, SEQUENCE), rng.integers(0, 40), replace=False))
            rows.append(np.diff([0, *cuts, SEQUENCE]).tolist())
        documents = Documents(numbers_of(positions_of(rows))[:, 0, :, 0])
        lengths = [n for row in rows for n in row]
        assert documents.bounds_E1.dtype == torch.int32 and documents.longest == SEQUENCE
        assert documents.bounds_E1.tolist() == [0, *np.cumsum(lengths)]
        assert [n for together in documents.stretches for n in together] == lengths
        for one, next_ in zip(documents.stretches, documents.stretches[1:]):
            assert len(one) == 1 or sum(one) <= TOGETHER
            assert sum(one) + next_[0] > TOGETHER


MASKED: dict[str, dict] = {
    "compile": {"compile": True},
    "dropout": {"model": TINY_MODEL | {"attention_dropout": 0.1}},
    "positions and a window": {
        "model": TINY_MODEL | {"model_type": "mistral", "sliding_window": 63},
        "method": TOKENS,
    },
    "fp32 on a GPU": {},
    "heads of 12 on a GPU": {"model": TINY_MODEL | {"head_dim": 12}, "precision": "bf16"},
}
APART: dict[str, dict] = {
    "plain": {},
    "dropout of what layers return": {"model": GPT2 | {"attn_pdrop": 0.0}},
    "positions": {"method": TOKENS},
    "positions and a window as long": {
        "model": TINY_MODEL | {"model_type": "mistral", "sliding_window": 64},
        "method": TOKENS,
    },
    "a window": {"model": TINY_MODEL | {"model_type": "mistral", "sliding_window": 5}},
    "bf16 on a GPU": {"precision": "bf16"},
}


@pytest.mark.parametrize("why", [*MASKED, *APART])
def test_runs_that_are_masked_are_those_that_are_named(why):
    fields = {**MASKED, **APART}[why]
    data = {**dict.fromkeys(("train", "valid", "tokenizer"), "absent"), "sequence": 64}
    for separate in (True, False):
        kept_apart = data | {"documents": "separate" if separate else "joined"}
        outline = make_outline(make_config(data=kept_apart, **fields))
        setting = subject_of(outline, "on a GPU" in why).setting
        assert setting.by_document == (separate and why in APART)
        window = bool(outline.config.model.get("sliding_window"))
        assert setting.has_mask == (not setting.by_document and (separate or window))


# real trainings


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory):
    """Prefixes of a corpus and of a held-out one, of documents of 2 to 250 tokens."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("short")
    cuts = np.cumsum(rng.integers(2, 250, 80))
    tokens = np.cumsum(rng.integers(1, 9, cuts[-1] + 100) ** 2) % 61
    parts = np.split(tokens, cuts)
    return write_corpus(folder / "train", parts[:60]), write_corpus(folder / "valid", parts[60:])


def _trains_what_plain_adamw_trains(layout, run, corpora, folder):
    overrides = [
        *(f"data.{name}={prefix}" for name, prefix in zip(("train", "valid"), corpora)),
        "data.documents=separate",
        "data.sequence=192",
        "batch={global: 12, micro: 2}",
        "model.max_position_embeddings=192",
        "method.balance_groups=4",
        "method.phases=[{until: 2, layers: 0.5, heads: 0.5}, {until: 3}]",
        "schedule.warmup=0",
        "steps=3",
        "checkpoint.every=3",
        "evaluate={every: 3, sequences: 12}",
    ]
    [run_dir] = train_in(folder, run, [(layout, "apart", overrides)])
    config = load_run(run, [f"run_dir={folder}/none", "parallel={}", *overrides])
    portion = Portion(0, 1, config.batch.micro)
    for (_, positions_BT), _ in prepare(config, 1).train.micro_batches(0, portion):
        rows = Documents(numbers_of(positions_BT)[:, 0, :, 0])
        assert len(rows.bounds_E1) > len(positions_BT) + 1
        assert 2 * 192 * 192 * 4 > len(rows.stretches) * SCORES_OF_CALL  # of four kept heads
    expected = plain_adamw(config)
    steps, evaluations = read_metrics(run_dir)
    assert_losses_close([e["loss"] for e in steps], expected.losses)
    assert_losses_close([e["eval_loss"] for e in evaluations], list(expected.held_out.values()))


def test_a_pipeline_that_recomputes_trains_what_plain_adamw_trains_under_masks(
    synthetic_run, short_documents, tmp_path
):
    case = "pipe 2, checkpointing", synthetic_run, short_documents, tmp_path
    _trains_what_plain_adamw_trains(*case)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE_LAYOUTS])
def test_every_layout_trains_what_plain_adamw_trains_under_masks(
    layout, synthetic_run, short_documents, tmp_path
):
    _trains_what_plain_adamw_trains(layout, synthetic_run, short_documents, tmp_path)


# on a GPU


@pytest.mark.parametrize(("groups", "causal", "window"), [(8, False, None), (2, True, 20)])
def test_the_kernel_is_called_as_torch_wants_it(groups, causal, window):
    """By torch's own rules for shapes and arguments, which need no GPU."""
    rows = Documents(numbers_of(positions_of(LENGTHS))[:, 0, :, 0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [(len(LENGTHS) * SEQUENCE, n, 64) for n in (8, groups, groups)]
        states = tuple(torch.empty(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        out = documents._in_one_kernel(states, rows, documents.Reach(causal, window), 0.2)
        out.sum().backward()
    assert out.shape == shapes[0] and [x.grad.shape for x in states] == shapes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [8, 2])
def test_the_kernel_gives_what_masked_attention_gives(groups, causal, window):
    """In bf16, within its rounding of masked attention in float32."""
    if window and not causal:
        pytest.skip("no model has it")
    number = numbers_of(positions_of(LENGTHS).cuda())
    rows = Documents(number[:, 0, :, 0])
    mask = rows.mask(documents.Reach(causal, window))
    module = SimpleNamespace(is_causal=causal, num_key_value_groups=8 // groups)
    found = []
    for given, dtype in ((number, torch.bfloat16), (mask, torch.float32)):
        generator = torch.Generator("cuda").manual_seed(0)
        states = [
            torch.randn(4, SEQUENCE, n, 64, generator=generator, device="cuda")
            .bfloat16()
            .to(dtype)
            .requires_grad_()
            for n in (8, groups, groups)
        ]
        across = (x.transpose(1, 2) for x in states)
        out, _ = attention(module, *across, given, scaling=0.2, sliding_window=window)
        out.backward(torch.randn(out.shape, generator=generator, device="cuda").to(dtype))
        found.append([out.detach().float(), *(x.grad.float() for x in states)])
    for ours, theirs in zip(*found):
        assert (ours - theirs).abs().max() <= 2e-2 * theirs.abs().max()
