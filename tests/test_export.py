"""Train, export, and use the folder as plain transformers does: every family and objective."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from est_ds.data.indexed import Corpus
from est_ds.data.loader import Portion
from est_ds.run.metrics import read_metrics
from exports import CELLS, FAST, exported, load, named, train_cells


@pytest.fixture(scope="module")
def slow_exports(corpus, tmp_path_factory):
    others = [cell for cell in CELLS if cell not in FAST]
    return train_cells(tmp_path_factory.mktemp("exports"), corpus, others)


@pytest.mark.parametrize("cell", FAST, ids=named)
def test_an_export_computes_the_reported_loss_and_stops(cell, fast_exports, corpus, capsys):
    check(cell, fast_exports[cell], corpus, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in FAST], ids=named)
def test_every_export_computes_the_reported_loss_and_stops(cell, slow_exports, corpus, capsys):
    check(cell, slow_exports[cell], corpus, capsys)


def check(cell, run_dir, corpus, capsys):
    folder = exported(run_dir)
    said = capsys.readouterr().out
    run, model, tokenizer = load(folder, run_dir)
    [evaluation] = read_metrics(run_dir)[1]
    within = {"fp32": 1e-6, "bf16": 1e-3}[cell[2]]
    assert plain_loss(run, model) == pytest.approx(evaluation["eval_loss"], rel=within)
    assert f"{evaluation['eval_loss']:.6g} reported by the run" in said

    manifest = Corpus.open(corpus / "valid").manifest
    assert (manifest.bos_id, manifest.eos_id) == (1, 2)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    if cell[0] != "bert":
        assert "\nsample: " in said
        assert stops_after(model, tokenizer, manifest.eos_id) == 3
    else:
        fills_masks(run, model, tokenizer, folder)


@torch.no_grad()
def plain_loss(run, model) -> float:
    """Mean cross-entropy over the targets, all samples at once."""
    [(inputs, (labels, *_))] = with_tuples(run.valid["valid"].held_out(5, Portion(0, 1, micro=5)))
    more = {"position_ids": inputs[1]} if run.config.data.documents == "separate" else {}
    if more and model.config.model_type == "bert":
        number_BT = (inputs[1] == 0).cumsum(-1)  # of the document; the library makes no mask of it
        more["attention_mask"] = number_BT[:, None, :, None] == number_BT[:, None, None]
    if run.hf_config.is_encoder_decoder:
        # The decoder's inputs are the library's own, made of the labels and the config.
        more["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    logits = model(input_ids=inputs[0], use_cache=False, **more).logits.float()
    return cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


def with_tuples(batches):
    return [tuple(p if isinstance(p, tuple) else (p,) for p in batch) for batch in batches]


def stops_after(model, tokenizer, eos: int) -> int:
    """New tokens of a generation in which the model wants EOS as the third one."""

    class WantsEos(transformers.LogitsProcessor):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            scores[:, eos] = 1e4 if self.calls == 3 else -1e4
            return scores

    wants = WantsEos()
    text = tokenizer("def f(x):", return_tensors="pt")
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    model.generate(**inputs, max_new_tokens=9, do_sample=False, logits_processor=[wants])
    return wants.calls


def fills_masks(run, model, tokenizer, folder):
    mask_id = run.train.objective.masking.mask_id
    assert tokenizer.mask_token_id == mask_id == 512
    pipeline = transformers.pipeline("fill-mask", model=str(folder), tokenizer=str(folder))
    best = pipeline("def f(x): [MASK]", top_k=1)[0]["token"]
    ids = tokenizer("def f(x): [MASK]", return_tensors="pt")["input_ids"]
    assert ids[0, -1] == mask_id
    with torch.no_grad():
        assert model.float()(input_ids=ids).logits[0, -1].argmax() == best
