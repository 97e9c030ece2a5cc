"""Attention of every document by itself: equal to the masked one, in every model and subnetwork."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from cases.families import CASES, draw_plan
from est_ds.slicing.build import build_model
from est_ds.slicing.documents import TOGETHER, Documents, attend_by_document, numbers_of
from est_ds.slicing.families import family_of, hf_config
from est_ds.slicing.subnetwork import Subnetwork

SEQUENCE = 150
# A document as long as the sequence, one of a single position, and more short ones than a call
# takes, in a row that they do not fill.
LENGTHS = [[70, 1, 1, 12, 3, 63], [150], [1, 2] * 30 + [60], [9] * 16 + [6]]
MODELS = ("llama", "mistral", "mistral_window", "qwen2", "qwen3", "gpt2", "bert")


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


@pytest.fixture(scope="module", params=MODELS)
def model(request):
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
