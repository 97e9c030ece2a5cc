"""Attention of every document by itself: equal to the masked one, in every model and subnetwork."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import cross_entropy

from cases.families import CASES
from est_ds.slicing.build import build_model
from est_ds.slicing.documents import attend_by_document
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
