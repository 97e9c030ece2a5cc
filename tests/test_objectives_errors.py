"""Objectives refuse what does not fit: the model, the data, or the settings among themselves."""

from __future__ import annotations

import pytest
import yaml

from cases.corpora import write_corpus
from cases.objectives import BERT, T5
from est_ds.config.run_file import load_run
from est_ds.errors import UserError
from est_ds.run.directory import check_run_dir
from est_ds.run.prepare import prepare

MLM, UL2 = {"name": "mlm"}, {"name": "ul2", "mixture": "causal_prefix_span"}
SPAN = {"kind": "span", "rate": 0.15, "mean": 3}
LARGE = {"vocab_size": 640}

# Model (keys of another family, or changes of the tiny Llama), objective, what the error names.
REFUSED = {
    "unknown objective": ({}, {"name": "casual"}, ["objective.name='casual'", "'causal'"]),
    "no name": ({}, {}, ["objective.name=None", "causal, mlm, ul2"]),
    "mlm with llama": ({}, MLM, ["'mlm'", "'llama'", "causal or ul2"]),
    "causal with bert": (BERT, {"name": "causal"}, ["'causal'", "'bert'", "mlm"]),
    "ul2 with bert": (BERT, UL2, ["'ul2'", "'bert'", "mlm"]),
    "causal with t5": (T5, {"name": "causal"}, ["'causal'", "'t5'", "ul2"]),
    "causal denoiser with t5": (T5, UL2, ["causal denoiser", "objective.mixture=ul2"]),
    "setting of another objective": ({}, {"name": "causal", "rate": 0.1}, ["objective.rate"]),
    "unknown setting": (BERT, {**MLM, "ratte": 0.1}, ["'objective.ratte'", "'rate'"]),
    "rate 0": (BERT, {**MLM, "rate": 0}, ["objective.rate=0", "greater than 0"]),
    "shares above 1": (
        BERT, {**MLM, "random": 0.3}, ["objective.mask=0.8", "objective.random=0.3"],
    ),
    "no id for the mask": (
        {**BERT, "vocab_size": 512}, MLM, ["id 512", "model.vocab_size=513"],
    ),
    "mask id too large": (BERT, {**MLM, "mask_id": 520}, ["objective.mask_id=520", "521"]),
    "special token that is none": (BERT, {**MLM, "special_ids": [600]}, ["600", "511"]),
    "vocabulary that is not the corpus's": (
        BERT, {**MLM, "vocabulary": 500}, ["objective.vocabulary=500", "512"],
    ),
    "no ids for the sentinels": ({}, UL2, ["ids 512 to 518", "model.vocab_size=519"]),
    "mixture and denoisers": (
        LARGE, {**UL2, "denoisers": [SPAN]}, ["objective.mixture", "objective.denoisers"],
    ),
    "unknown mixture": (LARGE, {**UL2, "mixture": "u2"}, ["objective.mixture='u2'", "'ul2'"]),
    "mean of a prefix": (
        LARGE,
        {"name": "ul2", "denoisers": [{"kind": "prefix", "rate": 0.3, "mean": 4}]},
        ["objective.denoisers.0", "mean has no effect"],
    ),
    "span without a mean": (
        LARGE,
        {"name": "ul2", "denoisers": [SPAN, {"kind": "span", "rate": 0.3}]},
        ["objective.denoisers.1", "needs mean"],
    ),
    "no room for a denoiser": (
        LARGE,
        {"name": "ul2", "denoisers": [{"kind": "span", "rate": 0.9, "mean": 1}]},
        ["data.sequence=64", "rate: 0.9", "longer"],
    ),
}  # fmt: skip


def loaded(tiny_run, tmp_path, model, objective, *overrides):
    tree = yaml.safe_load(tiny_run.read_text())
    tree["model"] = model if "model_type" in model else {**tree["model"], **model}
    tree |= {"objective": objective, "method": {"name": "full"}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return load_run(file, [f"run_dir={tmp_path / 'run'}", *overrides])


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case, tiny_run, tmp_path):
    model, objective, named = REFUSED[case]
    with pytest.raises(UserError) as error:
        prepare(loaded(tiny_run, tmp_path, model, objective), 4)
    for text in named:
        assert text in str(error.value)


def test_corpus_without_a_manifest_needs_the_vocabulary(tiny_run, corpus, tmp_path):
    write_corpus(tmp_path / "c", [range(1, 500)] * 20)
    foreign = (f"data.train={tmp_path / 'c'}", f"data.valid={tmp_path / 'c'}")
    with pytest.raises(UserError, match="set objective.vocabulary"):
        prepare(loaded(tiny_run, tmp_path, BERT, MLM, *foreign), 4)
    run = prepare(loaded(tiny_run, tmp_path, BERT, {**MLM, "vocabulary": 500}, *foreign), 4)
    masking = run.train.objective.masking
    assert (masking.mask_id, masking.vocabulary, masking.special_ids) == (500, 500, ())


def test_corpus_that_holds_no_window_is_refused(tiny_run, tmp_path):
    write_corpus(tmp_path / "c", [range(60)])
    overrides = (f"data.train={tmp_path / 'c'}", f"data.valid={tmp_path / 'c'}")
    with pytest.raises(UserError, match="60 tokens hold no window .* takes 64 .* data.sequence=60"):
        prepare(loaded(tiny_run, tmp_path, BERT, {**MLM, "vocabulary": 500}, *overrides), 4)


def test_run_of_another_objective_is_another_run(tiny_run, tmp_path):
    config = loaded(tiny_run, tmp_path, BERT, MLM)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(config.to_yaml())
    (run_dir / "metrics.jsonl").write_text('{"step": 0}\n')
    check_run_dir(config)
    with pytest.raises(UserError, match="objective.rate is None there and 0.3 here"):
        check_run_dir(loaded(tiny_run, tmp_path, BERT, {**MLM, "rate": 0.3}))


def test_run_directory_from_before_objectives_is_causal(tiny_run, tmp_path):
    config = load_run(tiny_run, [f"run_dir={tmp_path}"])
    tree = yaml.safe_load(config.to_yaml())
    assert tree.pop("objective") == {"name": "causal"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    check_run_dir(config)
