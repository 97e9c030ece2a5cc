"""Train, export, and use the folder as plain transformers does: every family and objective."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from cases.tiny import TINY_MODEL
from test_objectives_training import BERT, T5
from torch.nn.functional import cross_entropy
from workers import train_all

from est_ds import cli
from est_ds.checkpoints.index import read_index
from est_ds.checkpoints.store import Store
from est_ds.config.run_file import load_run
from est_ds.data.indexed import Corpus
from est_ds.design import plan_run
from est_ds.errors import UserError
from est_ds.export.config_file import complete_config
from est_ds.export.sample import continued
from est_ds.run.metrics import read_metrics
from est_ds.run.prepare import prepare
from est_ds.slicing.families import hf_config

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
    """Mean cross-entropy over the targets, all samples at once."""
    [(inputs, (labels, *_))] = with_tuples(run.valid["valid"].held_out(5, rank=0, world=1, micro=5))
    more = {}
    if run.hf_config.is_encoder_decoder:
        # The decoder's inputs are the library's own, made of the labels and the config.
        more["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    logits = model(input_ids=inputs[0], **more).logits.float()
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


def refused(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as e:
        cli.main(["export", *map(str, arguments)])
    return e.value.code, capsys.readouterr().err


GPT2_CELL = ("gpt2", "causal", "fp32")


@pytest.fixture
def gpt2(fast, tmp_path):
    """A copy of a trained run, to be altered."""
    without = shutil.ignore_patterns("export")
    return shutil.copytree(fast[GPT2_CELL], tmp_path / "run", ignore=without)


def test_a_folder_with_another_loss_than_reported_is_not_exported(gpt2, capsys):
    """As if the engine had computed with other weights than it saved."""
    checkpoint = Store(gpt2 / "checkpoints").path(STEPS)
    index = read_index(checkpoint)
    wrong = index.model_copy(update={"eval_loss": index.eval_loss * 1.001})
    (checkpoint / "checkpoint.json").write_text(wrong.to_json())
    code, said = refused(capsys, gpt2)
    assert code == 1 and f"reported the held-out loss {wrong.eval_loss:.6g} at step 2" in said
    assert f"have {index.eval_loss:.6g} in plain transformers" in said
    assert not [p for p in gpt2.iterdir() if "export" in p.name]
    exported(gpt2, "--skip-loss")
    assert "not compared (--skip-loss)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--checkpoint", "1"), "the run did not evaluate at step 1"),
        (("--layers", "0"), "the run evaluated the whole model"),
        (("data.valid={train}",), "the held-out corpora (data.valid) are others now"),
    ],
)
def test_an_export_without_a_loss_to_compare_says_why(arguments, reason, gpt2, corpus, capsys):
    exported(gpt2, *(argument.format(train=corpus / "train") for argument in arguments))
    assert f"held-out loss: not compared, since {reason}" in capsys.readouterr().out


def test_the_loss_of_an_evaluation_after_the_checkpoint_is_compared_too(gpt2, capsys):
    checkpoint = Store(gpt2 / "checkpoints").path(STEPS)
    index = read_index(checkpoint).model_copy(update={"eval_loss": None})  # a notice cut it short
    (checkpoint / "checkpoint.json").write_text(index.to_json())
    exported(gpt2, "evaluate.sequences=3")  # of later runs
    [evaluation] = read_metrics(gpt2)[1]
    assert f"{evaluation['eval_loss']:.6g} reported by the run" in capsys.readouterr().out


def test_another_tokenizer_exports_nothing(gpt2, corpus, tmp_path, capsys):
    """One with the same hash as sentencepiece's, which transformers reads otherwise."""
    other = shutil.copytree(corpus / "tokenizer", tmp_path / "tokenizer")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = (name for name, id_ in vocabulary.items() if id_ in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    (other / "tokenizer.json").write_text(json.dumps(content))
    code, said = refused(capsys, gpt2, f"data.tokenizer={other}")
    assert code == 2 and "tokenizer" in said and "valid" in said
    assert not [p for p in gpt2.iterdir() if "export" in p.name]


def test_every_file_of_an_export_has_the_mode_of_the_umask(gpt2):
    former = os.umask(0o027)
    try:
        folder = exported(gpt2)
    finally:
        os.umask(former)
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o640"}
    assert not list(folder.glob(".*"))


def test_a_prompt_beyond_the_positions_is_cut_and_one_without_a_token_left_out(gpt2, capsys):
    exported(gpt2, "--prompt", "def f(x):\n    return " * 20)
    said = capsys.readouterr().out
    assert "tokens the last 32 fit" in said and "\nsample: " in said
    exported(gpt2, "--prompt", "def f(x):\n    return " * 2)  # with fewer than 48 tokens of room
    assert "fit" not in (said := capsys.readouterr().out) and "\nsample: " in said
    _, model, tokenizer = load(gpt2 / "export", gpt2)
    tokenizer.backend_tokenizer.post_processor = None  # no BOS
    sample, [line] = continued(model, tokenizer, "", 64)
    assert sample is None and line == "no sample: the prompt '' has no token; give another --prompt"


ROPES = {
    # A run file's rope_parameters, and what transformers 4 was given by Llama's makers.
    "theta": (
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_theta": 500000.0, "rope_scaling": None},
    ),
    "llama3": (
        {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model", ("llama", "qwen3"))
def test_older_readers_find_rope_where_they_look_and_new_ones_read_the_same(model, rope, tmp_path):
    parameters, older = ROPES[rope]
    hf = hf_config({**MODELS[model], "rope_parameters": parameters})
    hf.dtype = "float32"
    hf.save_pretrained(tmp_path)
    before = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    complete_config(tmp_path, {"eos_token_id": 7})
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in older} == older and written["torch_dtype"] == "float32"
    after = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert after == before | {"eos_token_id": 7}
    assert after["rope_parameters"] == parameters


def test_a_t5_of_its_own_head_is_not_tied_by_older_readers(fast):
    folder = exported(fast["t5 v1.1", "ul2", "fp32"])
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert not torch.equal(model.lm_head.weight, model.shared.weight)


def test_ids_of_the_objective_have_names(fast):
    run_dir = fast["t5", "ul2", "fp32"]
    run, _, tokenizer = load(exported(run_dir), run_dir)
    first = run.train.objective.first_sentinel
    assert tokenizer.convert_ids_to_tokens([first - 3, first, first + 1]) == [
        "<mode_R>", "<extra_id_0>", "<extra_id_1>"
    ]  # fmt: skip


def test_a_decoder_start_of_0_is_one(fast):
    config = load_run(fast["t5", "ul2", "fp32"])
    for fields, start in (({"pad_token_id": 3}, 3), ({"decoder_start_token_id": 0}, 0)):
        model = {**config.model, "pad_token_id": 3, **fields}
        assert plan_run(config.model_copy(update={"model": model})).decoder_start == start
    nothing = config.model_copy(update={"model": {**config.model, "pad_token_id": None}})
    with pytest.raises(UserError, match="the decoder has no first input"):
        plan_run(nothing)
