"""A byte-level BPE of data_prep, from the text to what an exported model says."""

from __future__ import annotations

import json
import random

import pytest
import torch
import transformers
import yaml
from transformers import AutoTokenizer

from cases.objectives import BERT
from cases.tiny import TINY_MODEL
from conftest import ROOT
from data_prep.__main__ import main
from est_ds import cli
from est_ds.data.auto_tokenizer import plain_ids
from est_ds.data.encoders import load_encoder
from est_ds.data.indexed import Corpus
from est_ds.export.tokenizer import check_tokenizer
from workers import train_all

CODE = (ROOT / "est_ds" / "config" / "sections.py").read_text()
# What begins in a way of its own, and how.
SAYINGS = {
    "the quick brown fox jumps": "the quick",
    "good morning, world": "good",
    "x = [1, 2, 3]\n": "x =",
    "été à Paris": "été",
}
UNUSUAL = "  a\n\n\tb \u0301 好 😀 ﬁ \u2585\u2581 \x00\x7f\r\n 1234567 <|mask|><|end_of_text|> "
BOS, EOS, PAD, MASK = range(4)
VOCABULARY = 400


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, and documents that say one of a few things, packed with it."""
    folder, draws = tmp_path_factory.mktemp("bytes"), random.Random(0)
    for part, count in (("train", 1200), ("valid", 300)):
        said = [json.dumps({"text": draws.choice([*SAYINGS])}) + "\n" for _ in range(count)]
        (folder / f"{part}.jsonl").write_text("".join(said))
    (folder / "code.txt").write_text(CODE + UNUSUAL)
    inputs = (folder / "code.txt", folder / "train.jsonl")
    train = ("tokenizer", "--input", *inputs, "--model-type", "bytes", "--vocab", VOCABULARY)
    run(*train, "--out", folder / "tokenizer")
    run(*train, "--out", folder / "again")
    for part in ("train", "valid"):
        tokenizer = ("--tokenizer", folder / "tokenizer")
        run("pack", "--input", folder / f"{part}.jsonl", *tokenizer, "--out", folder / part)
        run("verify", "--out", folder / part, *tokenizer, "--min-bytes-per-token", "0.5")
    return folder


def test_every_text_comes_back_and_special_tokens_in_it_stay_text(folder):
    loaded = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    assert len(loaded) == VOCABULARY
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "unk_token_id")
    assert [getattr(loaded, name) for name in names] == [BOS, EOS, PAD, MASK, None]
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 97)]))
    for text in ("", " ", UNUSUAL, CODE, every):
        ids = plain_ids(loaded, text)
        assert loaded.decode(ids) == text and min(ids, default=9) > MASK
    digits = [plain_ids(loaded, digit) for digit in "123"]
    assert plain_ids(loaded, "123") == sum(digits, [])
    assert loaded("x = 1")["input_ids"] == [BOS, *plain_ids(loaded, "x = 1")]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / "tokenizer" / name).read_bytes() == (folder / "again" / name).read_bytes()


def test_a_corpus_has_its_bos_and_eos_and_says_so(folder):
    corpus = Corpus.open(folder / "train")
    corpus.check_tokenizer(folder / "tokenizer")
    made = corpus.manifest
    assert (made.bos_id, made.eos_id, made.unknown_id) == (BOS, EOS, None)
    assert made.vocabulary == VOCABULARY
    loaded = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    said = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    documents = [[*loaded(text)["input_ids"], EOS] for text in said]
    assert corpus.window(0, corpus.num_tokens).tolist() == sum(documents, [])


@pytest.mark.parametrize("has_manifest", [True, False])
def test_an_export_says_where_prompts_begin_otherwise_than_documents(
    has_manifest, folder, tmp_path
):
    tokenizer = folder / "tokenizer"
    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    for flag, said in (("--no-bos", "puts <|begin_of_text|> (id 0) before a text"), ("--bos", "")):
        texts = ("--input", folder / "valid.jsonl", "--tokenizer", tokenizer)
        run("pack", *texts, "--out", tmp_path / "c", flag)
        if not has_manifest:
            (tmp_path / "c.manifest.json").unlink()
        lines = check_tokenizer(loaded, load_encoder(tokenizer), [Corpus.open(tmp_path / "c")])
        assert [said in line for line in lines[1:]] == [True] * bool(said)


@pytest.mark.parametrize(
    ("vocabulary", "out", "said"),
    [
        ("260", "new", "--vocab=260 is not allowed; use at least 261: 256 bytes, 4 special tokens"),
        ("9000", "new", "--vocab=9000 does not fit the text of --input: no pair that is there 2"),
        ("300", "llama", "holds a tokenizer of another kind (tokenizer.model)"),
    ],
)
def test_what_cannot_be_is_refused(vocabulary, out, said, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(CODE[:3000])
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "tokenizer.model").touch()
    arguments = ["tokenizer", "--input", str(tmp_path / "a.txt"), "--model-type", "bytes"]
    assert main([*arguments, "--vocab", vocabulary, "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def exports(folder):
    """Models that have learnt the sayings, as folders of Hugging Face."""
    llama = {**TINY_MODEL, "vocab_size": VOCABULARY, "num_hidden_layers": 2}
    est = {"name": "est", "phases": [{"until": 0.3, "columns": 0.5}, {"until": 1.0}]}
    bert = {**BERT, "vocab_size": VOCABULARY}
    jobs = []
    for name, model, method, objective in (
        ("llama", llama, est, {"name": "causal"}),
        ("bert", bert, {"name": "full"}, {"name": "mlm", "mask_id": MASK}),
    ):
        data = {name: str(folder / name) for name in ("train", "valid", "tokenizer")}
        tree = {
            "run_dir": str(folder / name),
            "steps": 60,
            "model": model,
            "method": method,
            "objective": objective,
            "data": {**data, "sequence": 32, "documents": "separate"},
            "batch": {"global": 16, "micro": 16},
            "optimizer": {"lr": 1e-2},
            "checkpoint": {"every": 60},
            "evaluate": {"every": 60, "sequences": 5},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        jobs.append({"run": folder / f"{name}.yaml", "overrides": []})
    train_all(folder / "processes", 1, jobs)
    for name in ("llama", "bert"):
        cli.main(["export", str(folder / name)])
    return {name: folder / name / "export" for name in ("llama", "bert")}


def test_an_exported_model_says_what_it_was_taught_and_stops(folder, exports):
    model = transformers.AutoModelForCausalLM.from_pretrained(exports["llama"])
    tokenizer = AutoTokenizer.from_pretrained(exports["llama"], padding_side="left")
    packed_with = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    for text in (UNUSUAL, CODE):
        assert plain_ids(tokenizer, text) == plain_ids(packed_with, text)
    special = (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert special == (BOS, EOS, PAD)
    begun = tokenizer([*SAYINGS.values()], return_tensors="pt", padding=True)
    assert PAD in begun.input_ids and model.generation_config.eos_token_id == EOS
    said = model.generate(**begun, max_new_tokens=40, do_sample=False)
    assert tokenizer.batch_decode(said, skip_special_tokens=True) == [*SAYINGS]
    assert (said[:, -1] != EOS).any() and (said == EOS).any(dim=1).all()


def test_a_masked_models_mask_is_the_tokenizers(exports):
    model = transformers.AutoModelForMaskedLM.from_pretrained(exports["bert"])
    tokenizer = AutoTokenizer.from_pretrained(exports["bert"])
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mask|>", MASK)
    assert len(tokenizer) == VOCABULARY
    ids = tokenizer([*SAYINGS][0], return_tensors="pt").input_ids
    masked = torch.where(torch.arange(ids.shape[1]) == 3, MASK, ids)
    assert model(masked).logits.argmax(-1)[0, 3] == ids[0, 3]
