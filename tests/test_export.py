"""Train, export, and use the folder as plain transformers does: every family and objective."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import TINY_MODEL
from test_objectives_training import BERT, T5
from torch.nn.functional import cross_entropy
from workers import train_all

from est_ds import cli
from est_ds.checkpoints.store import Store
from est_ds.data.indexed import Corpus
from est_ds.metrics import read_metrics
from est_ds.run import prepare
from est_ds.run_file import load_run

STEPS = 2
SEQUENCE = 32
LLAMA = {**TINY_MODEL, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 560}
GPT2 = {
    "model_type": "gpt2", "vocab_size": 560, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 16},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "tie_word_embeddings": True},
    "gpt2": GPT2,
    "bert": BERT,
    "t5": T5,
    "t5 v1.1": {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
CELLS = [
    *((model, "causal", "fp32") for model in DECODERS),
    *((model, "ul2", "fp32") for model in (*DECODERS, "t5", "t5 v1.1")),
    ("bert", "mlm", "fp32"),
    *(("gpt2", "causal", "bf16"), ("bert", "mlm", "bf16"), ("t5", "ul2", "bf16")),
]
# One of each way in which an export was wrong.
FAST = [cell for cell in CELLS if cell[2] == "fp32" and (
    cell[0] in ("bert", "t5", "t5 v1.1") or cell[:2] in (("gpt2", "causal"), ("qwen3", "causal"))
)]  # fmt: skip


def named(cell) -> str:
    return "-".join(cell).replace(" ", "_")


@pytest.fixture(scope="module")
def trained_in(corpus, tmp_path_factory):
    """Trains cells, all in one start of one process; each one's run directory."""
    folder = tmp_path_factory.mktemp("exports")

    def train(cells) -> dict[tuple, Path]:
        jobs = []
        for cell in cells:
            model, objective, precision = cell
            data = {name: str(corpus / name) for name in ("train", "valid", "tokenizer")}
            tree = {
                "run_dir": str(folder / named(cell)), "seed": 3, "steps": STEPS,
                "precision": precision, "model": MODELS[model], "method": {"name": "full"},
                "objective": {"name": objective}, "data": {**data, "sequence": SEQUENCE},
                "batch": {"global": 4, "micro": 2}, "optimizer": {"lr": 3e-3},
                "parallel": {"pipe": 1, "zero": 1, "processes": 1},
                "checkpoint": {"every": 1, "keep_last": 0},
                "evaluate": {"every": STEPS, "sequences": 5},
            }  # fmt: skip
            file = folder / f"{named(cell)}.yaml"
            file.write_text(yaml.safe_dump(tree))
            jobs.append({"run": file, "overrides": []})
        train_all(folder / f"{len(cells)}_cells", 1, jobs)
        return {cell: folder / named(cell) for cell in cells}

    return train


@pytest.fixture(scope="module")
def fast(trained_in):
    return trained_in(FAST)


@pytest.fixture(scope="module")
def slow(trained_in):
    return trained_in([cell for cell in CELLS if cell not in FAST])


def exported(run_dir: Path, *arguments: str) -> Path:
    cli.main(["export", str(run_dir), *arguments])
    return run_dir / "export"


def load(folder: Path, run_dir: Path):
    """What a user loads, without a word about est_ds; and the run, for its held-out samples."""
    run = prepare(load_run(run_dir), 1)
    auto = getattr(transformers, run.family.auto_class)
    dtype = torch.bfloat16 if run.config.precision == "bf16" else torch.float32
    model = auto.from_pretrained(folder, dtype=dtype)
    return run, model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("cell", FAST, ids=named)
def test_an_export_computes_the_reported_loss_and_stops(cell, fast, corpus, capsys):
    check(cell, fast[cell], corpus, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in FAST], ids=named)
def test_every_export_computes_the_reported_loss_and_stops(cell, slow, corpus, capsys):
    check(cell, slow[cell], corpus, capsys)


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
    """Mean cross-entropy over the targets, all samples at once, a T5 given labels alone."""
    [(inputs, (labels, *_))] = with_tuples(run.valid["valid"].held_out(5, rank=0, world=1, micro=5))
    if run.hf_config.is_encoder_decoder:
        # Its decoder's inputs are the library's own, made of the labels and the config.
        return model(input_ids=inputs[0], labels=labels).loss.float().item()
    logits = model(input_ids=inputs[0]).logits.float()
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
