"""What an export refuses, what it says, and what it leaves to readers that came before."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
import transformers

from est_ds import cli
from est_ds.checkpoints.index import read_index
from est_ds.checkpoints.store import Store
from est_ds.config.run_file import load_run
from est_ds.design import make_design
from est_ds.errors import UserError
from est_ds.export.config_file import complete_config
from est_ds.export.sample import continued
from est_ds.run.metrics import read_metrics
from est_ds.slicing.families import hf_config
from exports import MODELS, STEPS, exported, load


def refused(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as e:
        cli.main(["export", *map(str, arguments)])
    return e.value.code, capsys.readouterr().err


GPT2_CELL = ("gpt2", "causal", "fp32")


@pytest.fixture
def gpt2(fast_exports, tmp_path):
    """A copy of a trained run, to be altered."""
    without = shutil.ignore_patterns("export")
    return shutil.copytree(fast_exports[GPT2_CELL], tmp_path / "run", ignore=without)


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


def test_a_t5_of_its_own_head_is_not_tied_by_older_readers(fast_exports):
    folder = exported(fast_exports["t5 v1.1", "ul2", "fp32"])
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert not torch.equal(model.lm_head.weight, model.shared.weight)


def test_ids_of_the_objective_have_names(fast_exports):
    run_dir = fast_exports["t5", "ul2", "fp32"]
    run, _, tokenizer = load(exported(run_dir), run_dir)
    first = run.train.objective.first_sentinel
    assert tokenizer.convert_ids_to_tokens([first - 3, first, first + 1]) == [
        "<mode_R>",
        "<extra_id_0>",
        "<extra_id_1>",
    ]


def test_a_decoder_start_of_0_is_one(fast_exports):
    config = load_run(fast_exports["t5", "ul2", "fp32"])
    for fields, start in (({"pad_token_id": 3}, 3), ({"decoder_start_token_id": 0}, 0)):
        model = {**config.model, "pad_token_id": 3, **fields}
        assert make_design(config.model_copy(update={"model": model})).decoder_start == start
    nothing = config.model_copy(update={"model": {**config.model, "pad_token_id": None}})
    with pytest.raises(UserError, match="the decoder has no first input"):
        make_design(nothing)
