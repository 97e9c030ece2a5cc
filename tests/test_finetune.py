"""`est-ds finetune`: GLUE's files, its metrics, classifiers on exports of three families."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from scipy import stats

from conftest import refused
from est_ds import cli
from est_ds.data.encoders import load_encoder
from est_ds.data.indexed import Corpus
from est_ds.errors import UserError
from est_ds.report.page import write_report
from est_ds.run.scores import read_fine_tunings
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


def test_two_texts_have_something_between_them(tokenizer):
    """The tokenizer of the tiny corpus puts nothing there."""
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    fill_up_with(loaded)
    assert loaded.pad_token_id is not None
    examples = Examples(("def f():", "x " * 90), ("return 1", "y " * 90), (0.0, 1.0))
    rows = inputs_of(examples, loaded, 40, types=False)
    a, b = (loaded(t, add_special_tokens=False)["input_ids"] for t in ("def f():", "return 1"))
    assert rows[0]["input_ids"][-len(a + b) - 1 :] == [*a, loaded.eos_token_id, *b]
    for row in rows:
        assert len(row["input_ids"]) == len(row["attention_mask"]) <= 40
        assert set(row) == {"input_ids", "attention_mask"}
    assert rows[1]["input_ids"].count(loaded.eos_token_id) == 1 and len(rows[1]["input_ids"]) == 40
    single = inputs_of(Examples(("def f():",), None, (0.0,)), loaded, 40, types=False)
    assert loaded.eos_token_id not in single[0]["input_ids"]


def test_made_tasks_are_of_the_text_in_its_order(corpus):
    encoder = load_encoder(corpus / "tokenizer")
    corpora = {name: Corpus.open(corpus / name) for name in ("valid", "train")}
    text = (corpus / "text.valid.jsonl").read_text()
    order = make_task("order", {"valid": corpora["valid"]}, encoder)
    seen = set()
    for examples in (order.train, order.dev):
        assert len(examples) > 20
        for first, second, label in zip(examples.first, examples.second, examples.labels):
            a, b = (json.dumps(s, ensure_ascii=False)[1:-1] for s in (first, second))
            both = (a, b) if label else (b, a)
            at = text.index(both[0])
            assert any(
                text[at + len(both[0]) :].lstrip("\\n \t").startswith(both[1])
                for at in [at, *occurrences(text, both[0])]
            )
            seen.add(label)
    assert seen == {0.0, 1.0} and order.classes == ("swapped", "in order")
    assert make_task("order", {"valid": corpora["valid"]}, encoder) == order
    source = make_task("source", corpora, encoder)
    assert source.classes == ("valid", "train") and source.train.second is None
    assert source.guess == 0.5
    with pytest.raises(UserError, match="this run has one"):
        make_task("source", {"valid": corpora["valid"]}, encoder)


def occurrences(text: str, part: str) -> list[int]:
    found, at = [], text.find(part)
    while at >= 0:
        found.append(at)
        at = text.find(part, at + 1)
    return found


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


@pytest.mark.parametrize("family", RUNS)
def test_a_classifier_learns_on_an_export(family, run_of, easy, capsys):
    """Two seeds differ, one gives the same again, and a rate of nothing learns nothing."""
    run_dir = run_of(family)
    arguments = ["--task", easy, "--lr", "1e-2,1e-9", "--seeds", "0,1", "--epochs", "8"]
    words = ["finetune", str(run_dir), "--json", *map(str, arguments), "--batch", "16"]
    cli.main(words)
    found = json.loads(capsys.readouterr().out)
    of = {(m["lr"], m["seed"]): m["metrics"]["accuracy"] for m in found["models"]}
    assert min(of[1e-2, 0], of[1e-2, 1]) >= 0.9 > max(of[1e-9, 0], of[1e-9, 1])
    assert found["examples"] == [96, 40] and found["guess"] == 0.5
    [tuned] = read_fine_tunings(run_dir)
    assert tuned.best_lr == 1e-2 and tuned.by_lr[1e-9] == [of[1e-9, 0], of[1e-9, 1]]
    assert {p.name for p in run_dir.glob(".export*")} == set()
    if family == "gpt2":
        cli.main(words)
        assert json.loads(capsys.readouterr().out) == found
        page = write_report(run_dir).read_text()
        assert "<td>0.01 *</td>" in page and "<td>easy</td>" in page


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


def test_what_cannot_be_fine_tuned_is_refused(run_of, fast_exports, easy, tmp_path, capsys):
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
        (["--lr", "0"], "'0' is not a number above 0"),
        (["--lr", "fast"], "'fast' is not a number above 0"),
        (["--seeds", "-1"], "'-1' is not a whole number"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(["finetune", str(run_dir), "--task", str(easy), *words])
        assert exit.value.code == 2 and expected in capsys.readouterr().err
