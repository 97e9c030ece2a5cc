"""`est-ds finetune`: GLUE's files, its metrics, classifiers on exports of three families."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from conftest import refused
from est_ds import cli
from est_ds.data.encoders import load_encoder
from est_ds.data.indexed import Corpus
from est_ds.errors import UserError
from est_ds.report.page import write_report
from est_ds.run.scores import read_fine_tunings
from est_ds.score import finetune
from est_ds.score.agreement import class_metrics, value_metrics
from est_ds.score.inputs import fill_up_with, inputs_of
from est_ds.score.made_tasks import make_task
from est_ds.score.tasks import Examples, read_task

RUNS = {"gpt2": ("gpt2", "causal", "fp32"), "bert": ("bert", "mlm", "fp32"), "llama": None}


@pytest.fixture
def run_of(fast_exports, trained, tmp_path):
    """Returns a run directory of a family, of the test's own."""

    def copied(family: str) -> Path:
        source = fast_exports[RUNS[family]] if RUNS[family] else trained
        return Path(shutil.copytree(source, tmp_path / f"{family} run"))

    return copied


def written(folder: Path, name: str, lines: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


# Of every form the lines of a training and of a development file, and what they say: the file's
# name, classes, metric, and the last training example.
FORMS = {
    "CoLA": (
        "tsv",
        ["gj04\t1\t\tThey drank.", 'gj04\t0\t*\tThey "drinks.'],
        ["gj04\t1\t\tShe ran."],
        (("0", "1"), "matthews", ('They "drinks.', None, 0.0)),
    ),
    "SST-2": (
        "tsv",
        ["sentence\tlabel", "hide new secretions\t0", "it 's fun\t1"],
        ["sentence\tlabel", "good\t1"],
        (("0", "1"), "accuracy", ("it 's fun", None, 1.0)),
    ),
    "MRPC": (
        "tsv",
        ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\ta b\tc d", "0\t7\t8\te\tf"],
        ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tg\th"],
        (("0", "1"), "accuracy", ("e", "f", 0.0)),
    ),
    "RTE": (
        "tsv",
        [
            "index\tsentence1\tsentence2\tlabel",
            "0\ta\tb\tnot_entailment",
            "1\tc\td\tentailment\r",
        ],
        ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment"],
        (("entailment", "not_entailment"), "accuracy", ("c", "d", 0.0)),
    ),
    "STS-B": (
        "tsv",
        ["index\tgenre\tsentence1\tsentence2\tscore", "0\tx\ta\tb\t5.000", "1\tx\tc\td\t3.25"],
        ["index\tgenre\tsentence1\tsentence2\tscore", "0\tx\ta\tb\t1.000"],
        ((), "spearman", ("c", "d", 3.25)),
    ),
    "a JSON of classes": (
        "jsonl",
        ['{"question": "q", "passage": "p", "label": true}'] * 3
        + ['{"question": "r", "passage": "s", "label": false, "idx": 1}'],
        ['{"question": "q", "passage": "p", "label": true}'],
        (("0", "1"), "accuracy", ("r", "s", 0.0)),
    ),
    "ten classes and more, by their numbers": (
        "jsonl",
        [json.dumps({"text": f"t{i}", "label": i}) for i in range(12)],
        [json.dumps({"text": "t", "label": 11})],
        (tuple(map(str, range(12))), "accuracy", ("t11", None, 11.0)),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_files_of_glue_are_read(form, tmp_path):
    ending, train, dev, (classes, metric, last) = FORMS[form]
    folder = written(tmp_path / "a task", f"train.{ending}", train)
    written(folder, f"dev.{ending}", dev)
    task = read_task(folder)
    assert (task.name, task.classes, task.metric) == ("a task", classes, metric)
    second = task.train.second and task.train.second[-1]
    assert (task.train.first[-1], second, task.train.labels[-1]) == last
    assert len(task.dev) == 1 and read_task(folder / f"train.{ending}") == task


def test_names_of_other_files_and_a_line_that_is_cut_short(tmp_path):
    """As of MNLI, whose lines have more, and QQP, of which some have less."""
    heading = "id\tquestion1\tquestion2\tis_duplicate"
    lines = [heading, *(f"{i}\ta{i}\tb{i}\t{i % 2}" for i in range(200)), "200\ttorn"]
    folder = written(tmp_path, "qqp.train.tsv", lines)
    written(folder, "qqp.dev_matched.tsv", [heading, "0\ta\tb\t1\tmore"])
    task = read_task(folder / "qqp.train.tsv")
    assert task.name == "qqp" and (len(task.train), task.train.skipped) == (200, 1)
    assert task.guess == 0.0  # as many of both; the first one, 0, is no answer of the other file
    assert len(task.up_to(50).train) == 50 and len(task.up_to(50).train.second) == 50


GOOD = ['{"sentence": "a", "label": 0}', '{"sentence": "b", "label": 1}']
BAD_TASKS = {
    "no file": ({}, "holds no train.tsv nor train.jsonl"),
    "no development file": ({"train.jsonl": GOOD}, "there is no dev.jsonl nor dev_matched.jsonl"),
    "empty": ({"train.tsv": [], "dev.tsv": []}, "train.tsv is empty"),
    "a heading alone": ({"train.tsv": ["sentence\tlabel"], "dev.tsv": []}, "no example"),
    "no label": (
        {"train.tsv": ["sentence\tgrade", "a\t1"], "dev.tsv": ["sentence\tgrade", "a\t1"]},
        "no column of labels: it has sentence, grade",
    ),
    "no text": (
        {"train.jsonl": ['{"body": "a", "label": 1}'], "dev.jsonl": GOOD},
        "no column of texts: it has body, label",
    ),
    "no JSON": ({"train.jsonl": [GOOD[0], "sentence"], "dev.jsonl": GOOD}, "line 2 of"),
    "a list": ({"train.jsonl": ["[1]"], "dev.jsonl": GOOD}, "line 1 of"),
    "many lines cut short": (
        {"train.jsonl": [*GOOD, '{"label": 1}'], "dev.jsonl": GOOD},
        "lacks 'label' or 'sentence' in 1 of 3 examples",
    ),
    "one class": ({"train.jsonl": GOOD[:1], "dev.jsonl": GOOD[:1]}, "every label of"),
    "a label of one file": (
        {"train.jsonl": GOOD, "dev.jsonl": ['{"sentence": "c", "label": -1}']},
        "has the label '-1', which",
    ),
    "pairs and single texts": (
        {"train.jsonl": GOOD, "dev.jsonl": ['{"sentence1": "c", "sentence2": "d", "label": 1}']},
        "has 1 texts an example and",
    ),
    "a label with two signs": (
        {
            "train.jsonl": [*GOOD, '{"sentence": "c", "label": "--1"}'],
            "dev.jsonl": ['{"sentence": "c", "label": "-2"}'],
        },
        "has the label '-2', which",
    ),
    "a text that is a list": (
        {"train.jsonl": [*GOOD, '{"sentence": ["c", "d"], "label": 1}'], "dev.jsonl": GOOD},
        'has ["c", "d"] where a text or a label stands',
    ),
    "a text that is null": (
        {"train.jsonl": [*GOOD, '{"sentence": null, "label": 1}'], "dev.jsonl": GOOD},
        "lacks 'label' or 'sentence' in 1 of 3 examples",
    ),
    "a value that is no number": (
        {
            "train.tsv": ["sentence1\tsentence2\tscore", "a\tb\tnan"],
            "dev.tsv": ["sentence1\tsentence2\tscore", "a\tb\t1.5"],
        },
        "score=nan is no number",
    ),
    "a value that is none": (
        {
            "train.tsv": ["sentence1\tsentence2\tscore", "a\tb\tmuch"],
            "dev.tsv": ["sentence1\tsentence2\tscore", "a\tb\t1.5"],
        },
        "'much'",
    ),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_a_task_of_another_form_is_refused(case, tmp_path):
    files, expected = BAD_TASKS[case]
    for name, lines in files.items():
        written(tmp_path, name, lines)
    with pytest.raises(UserError, match="--task") as refusal:
        read_task(tmp_path)
    assert expected in str(refusal.value)


def test_metrics_by_hand():
    """Of 10: 3 true positives, 1 false positive, 2 false negatives, 4 true negatives."""
    labels = np.array([1] * 5 + [0] * 5)
    predicted = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0])
    found = class_metrics(predicted, labels, 2)
    matthews = (3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6)
    assert found == pytest.approx({"accuracy": 0.7, "f1": 2 * 3 / 9, "matthews": matthews})
    assert class_metrics(np.ones(4, int), np.array([1, 0, 1, 1]), 2)["matthews"] == 0.0
    assert class_metrics(np.array([0, 2, 1]), np.array([0, 1, 1]), 3) == {"accuracy": 2 / 3}
    values, wanted = np.array([0.1, 0.4, 0.4, 0.9]), np.array([1.0, 2.0, 3.0, 2.5])
    found = value_metrics(values, wanted)
    assert found["spearman"] == pytest.approx(stats.spearmanr(values, wanted).statistic)
    assert found["pearson"] == pytest.approx(np.corrcoef(values, wanted)[0, 1])


def test_two_texts_have_something_between_them():
    """EOS, of a tokenizer that puts nothing there; what it puts there, of another one."""
    ids = {word: i for i, word in enumerate(("</s>", "<s>", "?", *"abcd"))}
    plain = Tokenizer(WordLevel(ids, unk_token="?"))
    plain.pre_tokenizer = Whitespace()
    examples = Examples(("a b", "a " * 90), ("c", "d " * 90), (0.0, 1.0))
    for template, expected in ((None, "a b </s> c"), ("<s> $A <s> $B", "<s> a b <s> c")):
        if template:
            put = [("<s>", 1)]
            plain.post_processor = TemplateProcessing(
                single="<s> $A", pair=template, special_tokens=put
            )
        loaded = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
        loaded.padding_side = "left"
        fill_up_with(loaded)
        assert (loaded.pad_token, loaded.padding_side) == ("</s>", "right")
        short, long = inputs_of(examples, loaded, 40, types=False)
        assert short["input_ids"] == [ids[word] for word in expected.split()]
        assert len(long["input_ids"]) == 40 and {ids["a"], ids["d"]} < set(long["input_ids"])
        for row in (short, long):
            assert row["attention_mask"] == [1] * len(row["input_ids"])
            assert set(row) == {"input_ids", "attention_mask"}
        [alone] = inputs_of(Examples(("a b",), None, (0.0,)), loaded, 40, types=False)
        assert alone["input_ids"][-2:] == [ids["a"], ids["b"]]


def test_made_tasks_are_of_the_text_in_its_order(corpus):
    encoder = load_encoder(corpus / "tokenizer")
    corpora = {name: Corpus.open(corpus / name) for name in ("valid", "train")}
    text = json.loads((corpus / "text.valid.jsonl").read_text())["text"]
    order = make_task("order", {"valid": corpora["valid"]}, encoder)
    seen = set()
    for examples in (order.train, order.dev):
        assert len(examples) > 20
        for a, b, label in zip(examples.first, examples.second, examples.labels):
            first, second = (a, b) if label else (b, a)
            assert re.search(rf"{re.escape(first)}\s+{re.escape(second)}", text)
            seen.add(label)
    assert seen == {0.0, 1.0} and order.classes == ("swapped", "in order")
    assert make_task("order", {"valid": corpora["valid"]}, encoder) == order
    source = make_task("source", corpora, encoder)
    assert source.classes == ("valid", "train") and source.train.second is None
    assert source.guess == 0.5
    with pytest.raises(UserError, match="this run has one"):
        make_task("source", {"valid": corpora["valid"]}, encoder)


@pytest.fixture(scope="module")
def easy(tmp_path_factory) -> Path:
    """A task that a word decides: which of two names is there."""
    folder = tmp_path_factory.mktemp("tasks") / "easy"
    for name, count in (("train", 96), ("dev", 40)):
        rows = [
            {"sentence1": f"def f{i}(x):", "sentence2": ("import", "return")[i % 2], "label": i % 2}
            for i in range(count)
        ]
        written(folder, f"{name}.jsonl", [json.dumps(row) for row in rows])
    return folder


def tuned(capsys, run_dir: Path, easy: Path, *more: str) -> dict:
    """What `est-ds finetune --json` prints, which must be JSON alone."""
    capsys.readouterr()
    words = ["--json", "--task", str(easy), "--epochs", "8", "--batch", "16", *more]
    cli.main(["finetune", str(run_dir), *words])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_learns_on_an_export(family, run_of, easy, capsys):
    found = tuned(capsys, run_of(family), easy, "--lr", "1e-2", "--seeds", "0")
    assert found["models"][0]["metrics"]["accuracy"] >= 0.9


def test_rates_and_seeds_are_tried_and_give_the_same_again(run_of, easy, capsys):
    """A rate of nothing learns nothing."""
    run_dir = run_of("gpt2")
    found = tuned(capsys, run_dir, easy, "--lr", "1e-2,1e-9", "--seeds", "0,1")
    of = {(m["lr"], m["seed"]): m["metrics"]["accuracy"] for m in found["models"]}
    assert min(of[1e-2, 0], of[1e-2, 1]) >= 0.9 > max(of[1e-9, 0], of[1e-9, 1])
    assert found["examples"] == [96, 40] and found["guess"] == 0.5
    [written] = read_fine_tunings(run_dir)
    assert written.best_lr == 1e-2 and written.by_lr[1e-9] == [of[1e-9, 0], of[1e-9, 1]]
    assert not list(run_dir.glob(".export*"))
    page = write_report(run_dir).read_text()
    assert "<td>0.01 *</td>" in page and "<td>easy</td>" in page
    again = tuned(capsys, run_dir, easy, "--lr", "1e-2", "--seeds", "1")
    assert again["models"] == [m for m in found["models"] if (m["lr"], m["seed"]) == (1e-2, 1)]


def test_values_are_learnt_as_values(run_of, tmp_path, capsys):
    lines = [f"def f(x): {'return' if i % 2 else 'import'}\t{i % 2 + 0.5}" for i in range(48)]
    for name in ("train", "dev"):
        written(tmp_path / "values", f"{name}.tsv", ["sentence\tscore", *lines])
    words = ["--task", str(tmp_path / "values"), "--lr", "1e-2", "--seeds", "0", "--epochs", "6"]
    cli.main(["finetune", str(run_of("gpt2")), *words, "--batch", "8"])
    said = capsys.readouterr().out
    [tuned] = read_fine_tunings(tmp_path / "gpt2 run")
    assert (tuned.metric, tuned.guess) == ("spearman", None)
    assert tuned.models[0].metrics["pearson"] > 0.9
    assert "values: 48 training examples, 48 development examples" in said


def test_what_cannot_be_fine_tuned_is_refused(
    run_of, fast_exports, easy, tmp_path, capsys, monkeypatch
):
    run_dir = run_of("gpt2")
    encoder_decoder = fast_exports["t5", "ul2", "fp32"]
    for words, expected in (
        ([run_dir, "--task", tmp_path / "none"], "holds no train.tsv"),
        ([run_dir, "--task", easy / "dev.jsonl"], "is no training file"),
        ([run_dir, "--task", "source"], "this run has one"),
        ([run_dir, "--task", easy, "--checkpoint", "9"], "checkpoint '9' is not in"),
        ([encoder_decoder, "--task", easy], "model.model_type='t5' has no classification head"),
    ):
        assert expected in refused(capsys, "finetune", *words)
    assert not (run_dir / "finetune.json").exists()
    for words, expected in (
        (["--tokens", "65"], "--tokens=65 is more than the 64 positions"),
        (["--tokens", "2"], "--tokens=2 leaves nothing of two texts"),
    ):
        assert expected in refused(capsys, "finetune", run_dir, "--task", easy, *words)
    (run_dir / "finetune.json").write_text("{}[")
    monkeypatch.setattr(finetune, "_Tuner", lambda *_: pytest.fail("it trains"))
    assert "finetune.json cannot be read" in refused(capsys, "finetune", run_dir, "--task", easy)
    for words, expected in (
        (["--seeds", str(2**32)], "is more than 4294967295"),
        (["--lr", "0"], "'0' is not a number above 0"),
        (["--lr", "fast"], "'fast' is not a number above 0"),
        (["--seeds", "-1"], "'-1' is not a whole number"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(["finetune", str(run_dir), "--task", str(easy), *words])
        assert exit.value.code == 2 and expected in capsys.readouterr().err
