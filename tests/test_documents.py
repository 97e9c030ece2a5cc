"""Documents of one sequence kept apart: masks, positions, labels, in every layout."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from batches import batches_of, windows_of
from cases.corpora import write_corpus
from conftest import train
from est_ds.config.run_file import load_run
from est_ds.data.indexed import Corpus
from est_ds.data.loader import IGNORED, Portion
from est_ds.data.objectives.loss import token_loss
from est_ds.data.objectives.mlm import Masking, Mlm
from est_ds.errors import UserError
from est_ds.report.summary import summarise
from est_ds.run.directory import check_run_dir
from est_ds.run.metrics import read_metrics
from est_ds.slicing.build import build_model
from est_ds.slicing.families import family_of, hf_config
from layouts import LAYOUTS, train_in
from reference import assert_close
from workers import train_all

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": SMALL | {"num_key_value_heads": 2},
    "mistral": SMALL | {"num_key_value_heads": 2, "sliding_window": 5},
    "qwen2": SMALL | {
        "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": SMALL | {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {
        "vocab_size": 97, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
    "bert": SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}  # fmt: skip
LENGTHS = [[7, 1, 1, 12, 3], [24], [1, 23]]


@pytest.fixture(scope="module", params=MODELS)
def packed(request):
    """A model with large weights, its pieces, and a batch of packed documents."""
    torch.manual_seed(0)
    config = hf_config({"model_type": request.param, **MODELS[request.param]})
    model = build_model(config, 0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, 97, (3, 24))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return family_of(request.param), config, model, ids, positions


def test_documents_in_one_sequence_have_the_logits_of_each_alone(packed):
    family, _, model, ids, positions = packed
    whole = model(**family.named_inputs((ids, positions)), use_cache=False).logits
    for row, lengths in enumerate(LENGTHS):
        for alone, together in zip(ids[row].split(lengths), whole[row].split(lengths)):
            torch.testing.assert_close(
                together, model(input_ids=alone[None]).logits[0], rtol=1e-5, atol=1e-5
            )
    joined = model(input_ids=ids).logits
    assert (joined[0] - whole[0]).abs().max() > 0.01  # the comparison can fail
    torch.testing.assert_close(joined[1], whole[1], rtol=1e-5, atol=1e-5)


def test_pieces_of_a_pipeline_equal_the_whole_model(packed):
    family, config, model, ids, positions = packed
    for inputs in ((ids, positions), (ids,)):
        x = inputs if len(inputs) > 1 else ids
        for piece in family.pieces(config):
            x = piece.forward(*(model.get_submodule(path) for path in piece.modules), x)
        whole = model(**family.named_inputs(inputs), use_cache=False).logits
        torch.testing.assert_close(x, whole, rtol=1e-5, atol=1e-5)


# samples


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    lengths = np.random.default_rng(4).choice([0, 1, 2, 5, 9, 40], 60)
    tokens = np.random.default_rng(5).integers(3, 97, lengths.sum())
    prefix = tmp_path_factory.mktemp("documents") / "c"
    return Corpus.open(write_corpus(prefix, np.split(tokens, np.cumsum(lengths)[:-1])))


def begins(small):
    starts = small.document_start(np.arange(small.num_documents + 1))
    return {int(a) for a, b in zip(starts, starts[1:]) if b > a}


def test_positions_restart_and_labels_stop_where_documents_begin(small):
    windows, starts = windows_of(small, sequence=16, separate=True), begins(small)
    count = windows.num_samples
    [((ids, positions), (labels, divisor))] = windows.held_out(count, Portion(0, 1, micro=count))
    targets = 0
    for row in range(count):
        position = 0
        for t in range(16):
            at = row * 16 + t
            position = 0 if t == 0 or at in starts else position + 1
            assert ids[row, t] == small.window(at, 1)[0]
            assert positions[row, t] == position
            crosses = at + 1 in starts
            assert labels[row, t] == (IGNORED if crosses else small.window(at + 1, 1)[0])
            targets += not crosses
    assert divisor == targets


def test_masked_labels_stay_and_their_positions_restart(small):
    masking = Masking(3, 0.8, 0.1, 97, 97, (1, 2))
    first = {"sequence": 16, "objective": Mlm(16, masking), "choice": "first"}
    joined, apart = windows_of(small, **first), windows_of(small, **first, separate=True)
    [(ids, (labels, divisor))] = joined.held_out(9, Portion(0, 1, micro=9))
    [(inputs, (same_labels, same_divisor))] = apart.held_out(9, Portion(0, 1, micro=9))
    assert torch.equal(inputs[0], ids) and torch.equal(labels, same_labels)
    assert divisor == same_divisor == 27
    starts = begins(small)
    zeros = {(r, t) for r in range(9) for t in range(16) if t == 0 or r * 16 + t in starts}
    assert {tuple(place) for place in (inputs[1] == 0).nonzero().tolist()} == zeros


@pytest.mark.parametrize("shuffled", [False, True])
def test_loss_is_the_mean_over_the_targets_of_the_global_batch(small, shuffled):
    batches = batches_of(
        [small], sequence=16, global_batch=12, seed=2, separate=True, shuffled=shuffled
    )
    logits = torch.randn(97, 97, generator=torch.Generator().manual_seed(0))  # by token
    [((ids, _), (labels, _))] = batches.micro_batches(5, Portion(0, 1, micro=12))
    assert (labels == IGNORED).any()
    expected = cross_entropy(logits[ids].flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    for world, micro in [(1, 12), (1, 1), (2, 3), (4, 1)]:
        losses = [
            token_loss(logits[ids], given)
            for rank in range(world)
            for (ids, _), given in batches.micro_batches(5, Portion(rank, world, micro=micro))
        ]
        torch.testing.assert_close(torch.stack(losses).mean(), expected)


def test_sequences_without_a_target_have_loss_0(tmp_path):
    prefix = write_corpus(tmp_path / "c", [[5]] * 40)
    batches = batches_of([Corpus.open(prefix)], sequence=4, global_batch=2, seed=0, separate=True)
    [((ids, positions), labels)] = batches.micro_batches(0, Portion(0, 1, micro=2))
    assert (positions == 0).all()
    assert token_loss(torch.randn(2, 4, 97), labels) == 0


# training


def data_of(corpus):
    """Two corpora in TinyLlama's proportions, documents shuffled and apart, two held-out ones."""
    weights = {"train": 0.6936, "valid": 0.3064}
    parts = [f"{{corpus: {corpus}/{name}, weight: {w}}}" for name, w in weights.items()]
    return [
        f"data.train=[{', '.join(parts)}]",
        f"data.valid={{own: {corpus}/valid, seen: {corpus}/train}}",
        "data.shuffle=documents",
        "data.documents=separate",
        "evaluate.sequences=5",
    ]


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    """The tiny run on a mixture with documents apart: in one process, in 2 x 2, and begun in 2 x 2
    and ended in one process."""
    overrides = data_of(load_run(tiny_run).data.train.removesuffix("/train"))
    folder = tmp_path_factory.mktemp("mixture")
    [four] = train_in(folder, tiny_run, [("pipe 2 x data 2, ZeRO 1", "mixture", overrides)])
    moved, one = shutil.copytree(four, folder / "moved"), folder / "one"
    (moved / "checkpoints" / "latest").write_text("step_00000010\n")
    layout = LAYOUTS["1 process"][1]
    jobs = [
        {"run": tiny_run, "overrides": [f"run_dir={one}", *layout, *overrides]},
        {"run": moved, "overrides": [*layout, "resume=latest"]},
    ]
    said = train_all(folder / "one_process", 1, jobs)
    assert "resuming at step 10 of 20" in said
    return {"1 process": one, "2 x 2": four, "2 x 2, then 1 process": moved}


def test_every_layout_trains_on_the_same_batches_with_the_same_losses(trained):
    expected, expected_evaluations = read_metrics(trained["1 process"])
    assert len({e["data_digest"] for e in expected}) == 20
    for run_dir in trained.values():
        steps, evaluations = read_metrics(run_dir)
        for name in ("step", "data_digest", "plan_digest"):
            assert [e[name] for e in steps] == [e[name] for e in expected]
        assert_close([e["loss"] for e in steps], [e["loss"] for e in expected])
        assert len(evaluations) == len(expected_evaluations) == 2
        for found, one in zip(evaluations, expected_evaluations):
            mean = np.mean(list(found["eval_losses"].values()))
            assert found["eval_loss"] == pytest.approx(mean)
            assert found["eval_losses"] == pytest.approx(one["eval_losses"], rel=1e-5)


def test_what_a_mixture_trained_on_is_said_and_checked(trained, corpus, tmp_path):
    run = load_run(trained["1 process"])
    assert [part.weight for part in run.data.parts] == [0.6936, 0.3064]
    summary = summarise(trained["1 process"])
    assert summary.eval_losses.keys() == {"own", "seen"} and summary.valid_entropy > 1.0
    refused = {
        "data.train.0.weight=0.5": "data.train.0.weight is 0.6936 there and 0.5 here",
        "data.shuffle=sequences": "data.shuffle is 'documents' there",
        "data.documents=joined": "data.documents is 'separate' there",
    }
    for override, named in refused.items():
        with pytest.raises(UserError, match=re.escape(named)):
            check_run_dir(load_run(trained["1 process"], [override]))
    # Corpora may move, but not change: here the two change places.
    run_dir = shutil.copytree(trained["1 process"], tmp_path / "run")
    (run_dir / "checkpoints" / "latest").write_text("step_00000015\n")
    places = [f"data.train.{i}.corpus={corpus}/{n}" for i, n in enumerate(("valid", "train"))]
    done = train(run_dir, *places, processes=1)
    assert done.returncode == 2
    assert f"data.train='{corpus}/valid' is not the corpus" in done.stderr
