"""`est-ds eval`: losses and log-likelihoods against plain loops and lm-eval; tasks; bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

from conftest import refused
from est_ds import cli
from est_ds.config.run_file import load_run
from est_ds.data.encoders import load_encoder
from est_ds.data.indexed import Corpus
from est_ds.disk import hold
from est_ds.report.page import write_report
from est_ds.run.scores import read_evaluations
from est_ds.run.windows import WindowLosses
from est_ds.score import evaluate, words
from est_ds.score.held_out import standard_error
from est_ds.score.likelihood import Scorer
from est_ds.score.source import exported

GPT2, BERT = ("gpt2", "causal", "fp32"), ("bert", "mlm", "fp32")
SEQUENCE, WINDOWS = 32, 5  # of the runs of exports.py


@pytest.fixture
def run_of(fast_exports, tmp_path):
    """Returns a run directory of a model, of the test's own."""

    def copied(cell) -> Path:
        return Path(shutil.copytree(fast_exports[cell], tmp_path / "run", dirs_exist_ok=True))

    return copied


@pytest.fixture(scope="module")
def scorers(fast_exports):
    """A model, its tokenizer and what computes its log-likelihoods, by the run's cell."""
    found = {}
    for cell in (GPT2, BERT):
        with exported(load_run(fast_exports[cell]), "latest") as source:
            model, tokenizer = source.model(), source.tokenizer()
        found[cell] = model, tokenizer, Scorer(model, tokenizer, 64)
    return found


@pytest.fixture(scope="module")
def items(scorers, corpus):
    """Items of a held-out corpus."""
    encoder = load_encoder(corpus / "tokenizer")
    return words.make_items([Corpus.open(corpus / "valid")], encoder, scorers[GPT2][2], 64, 60)


def evaluated(capsys, run_dir, *arguments) -> dict:
    """What `est-ds eval --json` prints, which must be JSON alone."""
    capsys.readouterr()
    cli.main(["eval", str(run_dir), "--json", *map(str, arguments)])
    return json.loads(capsys.readouterr().out)


@torch.no_grad()
def plain_losses(model, prefix: Path) -> np.ndarray:
    """The mean loss of every window of a corpus, from its file, one window after the other."""
    ids = np.fromfile(f"{prefix}.bin", np.uint16).astype(np.int64)
    whole, losses = (len(ids) - 1) // SEQUENCE, []
    for i in range(WINDOWS):
        begin = (2 * i + 1) * whole // (2 * WINDOWS) * SEQUENCE
        window = torch.from_numpy(ids[begin : begin + SEQUENCE + 1])
        log_p = model(input_ids=window[None, :-1]).logits[0].double().log_softmax(-1)
        losses.append(-log_p[range(SEQUENCE), window[1:]].mean().item())
    return np.array(losses)


def test_held_out_figures_are_those_of_a_plain_loop(run_of, corpus, capsys):
    """Of one corpus, and the mean of two."""
    run_dir = run_of(GPT2)
    cli.main(["export", str(run_dir)])
    model = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "export")
    losses = {name: plain_losses(model, corpus / name) for name in ("valid", "train")}
    error = {name: each.std(ddof=1) / math.sqrt(WINDOWS) for name, each in losses.items()}

    found = evaluated(capsys, run_dir)
    [(name, loss)] = found["held_out"].items()
    mean = losses["valid"].mean()
    manifest = json.loads((corpus / "valid.manifest.json").read_text())
    bits = manifest["num_tokens"] / manifest["text_bytes"] / math.log(2)
    assert name == "valid" and (loss["windows"], loss["targets"]) == (WINDOWS, WINDOWS * SEQUENCE)
    for figure, factor, value in (
        ("nats", 1.0, mean),
        ("bits_per_byte", bits, bits * mean),
        ("perplexity", math.exp(mean), math.exp(mean)),
    ):
        assert loss[figure]["value"] == pytest.approx(value, rel=1e-6)
        assert loss[figure]["error"] == pytest.approx(factor * error["valid"], rel=1e-4)
    assert loss["reported"] == pytest.approx(mean, rel=1e-6)

    two = {name: str(corpus / name) for name in losses}
    found = evaluated(capsys, run_dir, f"data.valid={json.dumps(two)}")
    assert found["mean"]["value"] == pytest.approx(np.mean([*losses.values()]), rel=1e-6)
    of_mean = math.hypot(*error.values()) / 2
    assert found["mean"]["error"] == pytest.approx(of_mean, rel=1e-4)


def test_losses_of_masked_tokens_are_those_that_the_run_reported(run_of, capsys):
    [loss] = evaluated(capsys, run_of(BERT))["held_out"].values()
    assert loss["nats"]["value"] == pytest.approx(loss["reported"], rel=1e-6)
    assert loss["bits_per_byte"] is None


def test_standard_error_of_windows_with_different_numbers_of_targets():
    """By hand: mean 10 / 4, sums of the losses 1 and 9 against 2.5 and 7.5."""
    found = WindowLosses(np.array([1.0, 3.0]), np.array([1, 3]), np.array([0, 1]))
    assert standard_error(found) == pytest.approx(math.sqrt(2 * 2 * 1.5**2) / 4)
    alone = WindowLosses(np.array([1.0]), np.array([1]), np.array([0]))
    assert standard_error(alone) is None


TOO_LONG = "for name in names: " * 30
PAIRS = [
    ("def f(x):", " return x"),
    ("def f(x): ", "return"),
    ("import", " os\n"),
    (TOO_LONG, "print(name)"),
    ("def f(x):", " return y"),
]


@torch.no_grad()
def test_log_likelihoods_after_a_context_are_those_of_one_text_at_a_time(scorers):
    model, tokenizer, scorer = scorers[GPT2]
    for (context, continuation), found in zip(PAIRS, scorer.after(PAIRS)):
        whole = tokenizer(context + continuation)["input_ids"]
        first = len(tokenizer(context.rstrip())["input_ids"])
        assert len(whole) > 65 or context != TOO_LONG
        ids = torch.tensor(whole[-65:])
        log_p = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
        each = [log_p[i - 1, ids[i]].item() for i in range(len(ids) - len(whole) + first, len(ids))]
        assert found == pytest.approx(sum(each), rel=1e-5)


@torch.no_grad()
def test_log_likelihoods_within_a_text_are_those_of_masked_tokens(scorers):
    model, tokenizer, scorer = scorers[BERT]
    before, word, after = "def name(", "self", "): return self"
    [found] = scorer.within([(before, word, after)])

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = tokenizer(before + word + after)["input_ids"]
    front = ids.index(plain(before)[0])
    places = range(front + len(plain(before)), front + len(plain(before + word)))
    assert tokenizer.decode(ids[places.start : places.stop]).strip() == word
    masked = torch.tensor([ids])
    masked[0, list(places)] = tokenizer.mask_token_id
    log_p = model(input_ids=masked).logits[0].log_softmax(-1)
    assert found == pytest.approx(sum(log_p[i, ids[i]].item() for i in places), rel=1e-5)


def test_log_likelihoods_are_those_of_lm_eval(scorers):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, scorer = scorers[GPT2]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert scorer.after(PAIRS) == pytest.approx([value for value, _ in theirs], rel=1e-6)


def test_items_ask_for_words_that_stand_in_the_held_out_text(items, scorers, corpus):
    [document] = (corpus / "text.valid.jsonl").read_text().splitlines()
    text = json.loads(document)["text"]
    assert len(items) > 30 and {item.answer for item in items} == set(range(words.CHOICES))
    for item in items:
        assert f"{item.before} {item.choices[item.answer]}{item.after}" in text
        assert len(set(item.choices)) == words.CHOICES
        assert len({scorers[GPT2][2].num_tokens(f" {word}") for word in item.choices}) == 1
    encoder = load_encoder(corpus / "tokenizer")
    again = words.make_items([Corpus.open(corpus / "valid")], encoder, scorers[GPT2][2], 64, 60)
    assert again == items


def test_a_choice_is_right_if_its_text_is_most_likely(items):
    """Of a scorer that knows the answers to every other item."""

    class Knows:
        def __init__(self, masked: bool) -> None:
            self.masked = masked

        def scores(self, texts) -> list[float]:
            known = [
                f"{item.before} {item.choices[item.answer]}{item.after}" for item in items[::2]
            ]
            return [1.0 if any(k.startswith(text) for k in known) else 0.0 for text in texts]

        def after(self, pairs):
            assert not self.masked
            return self.scores(map("".join, pairs))

        def within(self, texts):
            assert self.masked
            return self.scores(map("".join, texts))

    for task, masked in (("next_word", False), ("cloze", False), ("cloze", True)):
        right = words.correct(items, task, Knows(masked), masked)
        assert right[::2].all()
        # Where all are as likely the first one is taken.
        others = items[1::2]
        assert right[1::2].tolist() == [item.answer == 0 for item in others]


def write_task(folder: Path, items, **changes) -> Path:
    """A task of lm-eval in local files: its YAML."""
    folder.mkdir(exist_ok=True)
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(vars(item)) + "\n" for item in items))
    task = {
        "task": "of_ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{before}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}],
        **changes,
    }
    file = folder / "of_ours.yaml"
    file.write_text(yaml.safe_dump(task))
    return file


def test_tasks_are_written_kept_and_drawn_and_equal_lm_evals(
    run_of, scorers, items, tmp_path, capsys
):
    """Our next_word is the same task as lm-eval's reading of its items."""
    pytest.importorskip("lm_eval")
    run_dir = run_of(GPT2)
    ours = evaluated(capsys, run_dir, "--tasks", "next_word,cloze", "--limit", 60)["tasks"]
    with exported(load_run(run_dir), "latest") as source:
        corpora = [held.corpus for held in source.windows.values()]
        encoder = load_encoder(source.config.data.tokenizer)
        same = words.make_items(corpora, encoder, scorers[GPT2][2], SEQUENCE, 60)
    write_task(tmp_path / "tasks", same)
    both = evaluated(capsys, run_dir, "--tasks", "of_ours", "--include", tmp_path / "tasks")
    theirs = both["tasks"].pop("of_ours")
    assert both["tasks"] == ours and theirs["by"].startswith("lm_eval 0.")
    for part in ("value", "error"):
        value = ours["next_word"]["metrics"]["acc"][part]
        assert theirs["metrics"]["acc"][part] == pytest.approx(value)
    assert theirs["examples"] == ours["next_word"]["examples"] == len(same)
    [written] = read_evaluations(run_dir)
    assert set(written.tasks) == {"next_word", "cloze", "of_ours"} and written.step == 2
    page = write_report(run_dir).read_text()
    assert "Scores of checkpoints" in page
    for cell in ("of_ours", f"{ours['cloze']['metrics']['acc']['value']:.4f} ± "):
        assert cell in page


def test_an_export_is_used_if_it_is_of_that_checkpoint(run_of, capsys):
    run_dir = run_of(GPT2)
    cli.main(["export", str(run_dir), "--checkpoint", "1"])
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    losses = {}
    for step, where in ((1, f"{run_dir}/export"), (2, "an export for this alone")):
        capsys.readouterr()
        cli.main(["eval", str(run_dir), "--checkpoint", str(step)])
        assert f"(model: {where}" in capsys.readouterr().out
        losses[step] = read_evaluations(run_dir)[-1].held_out["valid"].nats.value
    assert losses[1] != losses[2] and [e.step for e in read_evaluations(run_dir)] == [1, 2]
    after = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    changed = {p for p in before | after if before.get(p) != after.get(p)}
    assert changed == {run_dir / "eval.json"}  # nothing is left behind
    mark = run_dir / "export" / "est_ds_export.json"
    whole = json.loads(mark.read_text())
    mark.write_text(json.dumps(whole | {"layers": "0"}))
    capsys.readouterr()
    cli.main(["eval", str(run_dir), "--checkpoint", "1"])
    assert "an export for this alone" in capsys.readouterr().out
    mark.write_text(json.dumps(whole))
    error = refused(capsys, "eval", run_dir, "--checkpoint", "1", "data.documents=separate")
    assert "data.documents is 'joined' there" in error


def test_what_cannot_be_evaluated_is_refused(run_of, tiny_run, tmp_path, monkeypatch, capsys):
    run_dir = run_of(GPT2)
    absent = f"run_dir={tmp_path}/absent"
    assert "holds no checkpoint; train the run first" in refused(capsys, "eval", tiny_run, absent)
    at = refused(capsys, "eval", run_dir, "--checkpoint", "7")
    assert "checkpoint '7' is not in" in at and "1, 2" in at
    for words_, expected in (
        (["--limit", "3"], "--limit=3 has no effect without --tasks"),
        (["--tasks", "cloze", "--shots", "1"], "--shots=1 has no effect without a task of lm-eval"),
        (["--tasks", "cloze", "data.valid=nowhere"], "nowhere"),
    ):
        assert expected in refused(capsys, "eval", run_dir, *words_)
    assert "--tasks=',' names no task" in refused(capsys, "eval", run_dir, "--tasks", ",")
    (run_dir / "eval.json").write_text("{}[")
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "held_out_losses", lambda *_: pytest.fail("it evaluates"))
        assert "eval.json cannot be read" in refused(capsys, "eval", run_dir)
    assert not list(run_dir.glob(".export*"))


def test_nothing_is_left_in_the_run_directory_by_a_signal_or_a_killed_process(run_of, monkeypatch):
    run_dir = run_of(GPT2)

    def ended(*_):
        [made] = run_dir.glob(".export_*")
        with pytest.raises(BlockingIOError):
            hold(made / "held")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(evaluate, "held_out_losses", ended)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit:
        cli.main(["eval", str(run_dir)])
    assert exit.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    assert not list(run_dir.glob(".export_*")) and not (run_dir / "eval.json").exists()
    for name in ("left", "at_work"):
        (run_dir / f".export_{name}").mkdir()
        (run_dir / f".export_{name}" / "held").write_text("")
    with hold(run_dir / ".export_at_work" / "held"), exported(load_run(run_dir), "latest"):
        names = {path.name for path in run_dir.glob(".export_*")}
        assert ".export_at_work" in names and ".export_left" not in names and len(names) == 2


def test_a_masked_model_is_asked_for_nothing_but_the_cloze(run_of, capsys):
    run_dir = run_of(BERT)
    error = refused(capsys, "eval", run_dir, "--tasks", "next_word")
    assert "next_word" in error and "cloze alone can be asked" in error
    found = evaluated(capsys, run_dir, "--tasks", "cloze", "--limit", 30)
    assert 0 <= found["tasks"]["cloze"]["metrics"]["acc"]["value"] <= 1


def test_tasks_that_lm_eval_cannot_load_are_refused(run_of, tmp_path, items, capsys):
    pytest.importorskip("lm_eval")
    run_dir, folder = run_of(GPT2), tmp_path / "tasks"
    other = tmp_path / "other.yaml"
    other.write_text("- a list\n- of words\n")
    missing = write_task(folder, items, dataset_kwargs={"data_files": {"test": "nowhere.jsonl"}})
    torn = words.Item("before", "after", (), 3)  # lm-eval looks at the first item when it loads
    unfit = write_task(tmp_path / "unfit", [*items, torn])
    empty = write_task(tmp_path / "empty", [])
    for words_, expected in (
        ([str(empty)], "its data have no example"),
        ([str(other)], "other.yaml' cannot be loaded"),
        ([str(missing)], "of_ours.yaml' cannot be loaded"),
        (["nowhere.yaml"], "'nowhere.yaml' does not exist"),
        (["of_ours", "--include", "nowhere"], "--include='nowhere' is no folder"),
    ):
        assert expected in refused(capsys, "eval", run_dir, "--tasks", *words_), words_
    with pytest.raises(SystemExit) as exit:
        cli.main(["eval", str(run_dir), "--tasks", str(unfit)])
    said = capsys.readouterr()
    assert exit.value.code == 2 and said.out == ""
    last = said.err.splitlines()[-1]  # behind lm-eval's own bars
    assert last.startswith("est-ds: error: --tasks=") and "does not fit its data" in last
    assert not (run_dir / "eval.json").exists()


@pytest.mark.slow  # lm-eval reads all its tasks' files: 15 s
def test_an_unknown_task_is_refused_with_the_nearest_one(run_of, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    asked = ("--tasks", "arc_easi", "--include", tmp_path)
    error = refused(capsys, "eval", run_of(GPT2), *asked)
    assert "'arc_easi' is no task" in error and "did you mean 'arc_easy'?" in error


def test_a_missing_lm_eval_is_said_with_how_to_install_it(run_of, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    error = refused(capsys, "eval", run_of(GPT2), "--tasks", "arc_easy")
    assert "--tasks=arc_easy needs lm-eval" in error and "pip install -e '.[eval]'" in error
