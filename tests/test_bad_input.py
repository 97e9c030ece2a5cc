"""Bad input: one clear error, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from conftest import est_ds, refused, train
from est_ds import cli
from est_ds.config.run_file import load_run
from est_ds.errors import UserError
from est_ds.ranks.world import World, meeting_place
from est_ds.run.directory import lock_run_dir
from est_ds.run.prepare import prepare
from packings import pack

# Overrides of the tiny run, and what the error must name.
REFUSED = {
    "unknown key": (["batch.macro=4"], ["'batch.macro'", "'micro'"]),
    "unknown section": (["optimiser.lr=1"], ["'optimiser'", "'optimizer'"]),
    "number for a section": (["seeds=3"], ["seeds=3: write a section, {KEY: VALUE, ...}."]),
    "unknown method": (["method.name=etc"], ["method.name='etc'", "est"]),
    "unknown method key": (["method.balance_group=2"], ["method.balance_group", "balance_groups"]),
    "unknown phase key": (["method.phases.0.layer=1.0"], ["layer", "layers"]),
    "unknown model key": (["model.hidden_sise=4"], ["model.hidden_sise", "hidden_size"]),
    "dropout of everything": (
        ["model.attention_dropout=1"],
        ["model.attention_dropout=1.0", "less than 1"],
    ),
    "dropout below 0": (["model.attention_dropout=-0.1"], ["attention_dropout=-0.1", "0.0"]),
    "dropout in compiled layers": (
        ["model.attention_dropout=0.1", "compile=true"],
        ["compile=True", "model.attention_dropout=0.1", "compile=false"],
    ),
    "padding token that is no token": (
        ["model.pad_token_id=512"],
        ["model.pad_token_id=512", "0 to 511"],
    ),
    "unknown family": (["model.model_type=gptj"], ["gptj", "llama"]),
    "phases that do not end at the last step": (["steps=21"], ["step 20", "steps=21"]),
    "phases that do not increase": (["method.phases.1.until=8"], ["phases[1].until=8", "increase"]),
    "phase as messages write it": (["method.phases[1].until=8"], ["phases[1].until=8", "increase"]),
    "fraction 0": (["method.phases.0.heads=0"], ["heads=0", "greater than 0"]),
    "fraction above 1": (["method.phases.0.layers=1.5"], ["layers=1.5", "less than or equal to 1"]),
    "batch that does not divide": (["batch.micro=3"], ["batch.global=8", "batch.micro=3", "12"]),
    "pipe that does not divide the runs": (
        ["method.balance_groups=3", "method.phases.0.layers=1.0"],
        ["parallel.pipe=2", "balance_groups"],
    ),
    "pipe that does not divide the processes": (
        ["parallel.processes=3"],
        ["parallel.pipe=2", "3 processes"],
    ),
    "vocabulary larger than the model's": (["model.vocab_size=256"], ["512", "256"]),
    "corpus missing": (["data.train=nowhere/train"], ["nowhere/train"]),
    "tokenizer missing": (["data.tokenizer=nowhere"], ["nowhere"]),
    "sequence longer than the model's": (["data.sequence=65"], ["data.sequence=65", "64"]),
    "more held-out sequences than there are": (
        ["evaluate.sequences=100000"],
        ["evaluate.sequences=100000"],
    ),
    "warm-up longer than the run": (["schedule.warmup=21"], ["schedule.warmup", "steps=20"]),
    "decay of a cosine": (["schedule.decay=3"], ["schedule.decay"]),
    "learning rate 0": (["optimizer.lr=0"], ["optimizer.lr=0"]),
    "steps that are no number": (["steps=many"], ["steps='many'"]),
    "ZeRO 2 with a pipeline": (["parallel.zero=2"], ["parallel.zero=1"]),
    "owned DeepSpeed key": (
        ["deepspeed.train_batch_size=4"],
        ["deepspeed.train_batch_size", "batch.global"],
    ),
    "owned DeepSpeed sub-key": (
        ["deepspeed.zero_optimization.stage=1"],
        ["zero_optimization.stage", "parallel.zero"],
    ),
    "refused DeepSpeed key": (
        ["deepspeed.zero_optimization.round_robin_gradients=true"],
        ["round_robin_gradients", "wrong weights"],
    ),
    "owned DeepSpeed key that is off": (
        ["deepspeed.steps_per_print=0"],
        ["deepspeed.steps_per_print", "log.every"],
    ),
    "two TensorBoards": (
        ["deepspeed.tensorboard={enabled: true}"],
        ["log.to=tensorboard", "deepspeed.tensorboard"],
    ),
    "unknown tracker": (["log.to=[tensorbord]"], ["log.to.0='tensorbord'", "'tensorboard'"]),
    "tracker named twice": (["log.to=[tensorboard, tensorboard]"], ["log", "more than once"]),
    "project of TensorBoard": (["log.project=mine"], ["project='mine'", "no effect"]),
    "unknown DeepSpeed key": (
        ["deepspeed.zero_optimisation.overlap_comm=true"],
        ["deepspeed.zero_optimisation", "'zero_optimization'"],
    ),
    "unknown DeepSpeed sub-key": (["deepspeed.zero_optimization.stge=1"], ["stge"]),
    "DeepSpeed size that is no number": (
        [
            "parallel={pipe: 1, zero: 3}",
            "deepspeed.zero_optimization.stage3_prefetch_bucket_size=auto",
        ],
        ["stage3_prefetch_bucket_size='auto'", "whole number of at least 0"],
    ),
    "DeepSpeed size below the least": (
        ["deepspeed.zero_optimization.reduce_bucket_size=0"],
        ["reduce_bucket_size=0", "at least 1"],
    ),
    "DeepSpeed section that is no mapping": (["deepspeed.zero_optimization=3"], ["mapping"]),
    "dtype of the model": (["model.dtype=float16"], ["model.dtype", "precision"]),
    "model without layers": (["model.num_hidden_layers=0"], ["0 layers"]),
    "model without K/V heads": (["model.num_key_value_heads=0"], ["0 key/value heads"]),
    "unknown activation": (["model.hidden_act=foo"], ["model.hidden_act='foo'"]),
    "text for an angle": (["model.rope_theta=abc"], ["model.rope_theta='abc'"]),
    "problem type": (["model.problem_type=x"], ["model.problem_type='x'", "set null"]),
    "no space after a colon": (["schedule={name:wsd}"], ["schedule.name", "'name:wsd'", "cosine"]),
    "infinite learning rate": (["optimizer.lr=.inf"], ["optimizer.lr=inf"]),
    "warm-up above 1": (["schedule.warmup=1.5"], ["schedule.warmup=1.5"]),
    "run directory below a file": (["run_dir=/dev/null/run"], ["/dev/null/run"]),
    "override without a value": (["steps"], ["'steps'", "section.field=value"]),
    "override into a list that is too short": (["method.phases.7.until=3"], ["'7'", "0 to 2"]),
    "mixture without weights or names": (["data.train=[a, b]"], ["list of {corpus: PREFIX"]),
    "number for a corpus": (["data.train=5"], ["data.train=5", "prefix of a corpus"]),
    "list of held-out corpora": (["data.valid=[a, b]"], ["data.valid", "{NAME: PREFIX"]),
    "mixture without a corpus": (["data.train=[]"], ["data.train", "at least 1"]),
    "unknown key of a mixture": (
        ["data.train=[{corpus: a, wieght: 1}]"],
        ["'data.train.0.wieght'", "'weight'"],
    ),
    "mixture without weights": (
        ["data.train=[{corpus: a}, {corpus: b}]"],
        ["data", "train[0].weight is missing"],
    ),
    "weight 0": (["data.train=[{corpus: a, weight: 0}]"], ["data.train.0.weight=0"]),
    "corpus twice in a mixture": (
        ["data.train=[{corpus: a, weight: 1}, {corpus: a, weight: 2}]"],
        ["/a twice"],
    ),
    "missing corpus of a mixture": (
        ["data.train=[{corpus: nowhere/a, weight: 1}, {corpus: nowhere/b, weight: 2}]"],
        ["nowhere/a.idx"],
    ),
    "weights and phases": (
        [
            "data.train=[{corpus: a, weight: 1}, {corpus: b, weight: 2}]",
            "data.phases=[{until: 1.0, weights: [1, 1]}]",
        ],
        ["train[0].weight has no effect"],
    ),
    "weights for other corpora": (
        ["data.train=[{corpus: a}, {corpus: b}]", "data.phases=[{until: 1.0, weights: [1]}]"],
        ["phases[0].weights", "1 numbers for the 2 corpora"],
    ),
    "corpus that is never read": (
        ["data.train=[{corpus: a}, {corpus: b}]", "data.phases=[{until: 1.0, weights: [1, 0]}]"],
        ["/b, whose weight is 0"],
    ),
    "phases of the data that end early": (
        ["data.train=[{corpus: a}, {corpus: b}]", "data.phases=[{until: 0.5, weights: [1, 1]}]"],
        ["data.phases[0].until=0.5", "step 10", "steps=20"],
    ),
    "phases of one corpus": (
        ["data.phases=[{until: 1.0, weights: [1]}]"],
        ["phases need a mixture"],
    ),
    "weights of too many digits": (
        ["data.train=[{corpus: a, weight: 0.12345678}, {corpus: b, weight: 0.87654322}]"],
        ["0.12345678", "six decimals"],
    ),
    "held-out corpus without a name": (["data.valid={}"], ["data.valid", "at least 1"]),
    "name of a held-out corpus": (["data.valid={a/b: c}"], ["a/b"]),
    "unknown shuffle": (["data.shuffle=tokens"], ["data.shuffle='tokens'", "'documents'"]),
    "documents apart in UL2": (
        ["objective={name: ul2}", "data.documents=separate"],
        ["data.documents='separate'", "objective.name='ul2'", "joined"],
    ),
    "groups of heads that do not divide": (
        ["model.num_key_value_heads=3"],
        ["num_key_value_heads=3"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_clear_error_and_nothing_is_written(case, tiny_run, tmp_path, capsys):
    overrides, named = REFUSED[case]
    run_dir = tmp_path / "run"
    error = refused(capsys, "train", tiny_run, f"run_dir={run_dir}", *overrides)
    assert "constrained" not in error
    for text in named:
        assert text in error
    assert not run_dir.exists()


def test_plan_checks_what_of_the_data_is_here(tiny_run, corpus, tmp_path, capsys):
    for name, text in (
        ("model.vocab_size=256", "vocabulary 512 of the corpus"),
        ("evaluate.sequences=100000", "evaluate.sequences=100000"),
        ("batch.global=100000", "batch.global=100000"),
    ):
        assert text in refused(capsys, "plan", tiny_run, name)
    # The last document begins before the first one, which matters where documents are apart.
    for ending in ("bin", "idx"):
        shutil.copy(corpus / f"train.{ending}", tmp_path / f"odd.{ending}")
    with open(tmp_path / "odd.idx", "r+b") as file:
        file.seek(-16, os.SEEK_END)
        file.write(bytes(8))
    odd = (tiny_run, f"data.train={tmp_path}/odd", "data.documents=separate")
    assert "odd.idx: its entries do not follow" in refused(capsys, "plan", *odd)
    # The manifests alone, as on a machine that holds no data.
    for name in ("train", "valid"):
        shutil.copy(corpus / f"{name}.manifest.json", tmp_path)
    there = [f"data.train={tmp_path}/train", f"data.valid={tmp_path}/valid"]
    error = refused(capsys, "plan", tiny_run, *there, "evaluate.sequences=100000")
    assert "evaluate.sequences=100000" in error
    # Its own manifest tells how many held-out windows of 64 tokens and one more there are.
    num_tokens = json.loads((tmp_path / "valid.manifest.json").read_text())["num_tokens"]
    assert f"has {(num_tokens - 1) // 64} windows" in error
    cli.main(["plan", str(tiny_run), "--json", *there, "data.tokenizer=elsewhere"])
    output = capsys.readouterr()
    assert json.loads(output.out)["total_steps"] == 20
    named = f"{tmp_path}/train (but its manifest), {tmp_path}/valid (but its manifest), elsewhere"
    assert output.err == f"est-ds: not checked, since not here: {named}\n"


def test_options_of_plan_are_checked_and_its_own_usage_is_shown(tiny_run, capsys):
    assert "parallel.pipe=2 does not divide 3" in refused(
        capsys, "plan", tiny_run, "--processes", "3", "--json"
    )
    with pytest.raises(SystemExit) as exit:
        cli.main(["plan", str(tiny_run), "--proceses", "3"])
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: est-ds plan [-h] [--processes N]")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_corpus_is_refused(suffix, tiny_run, corpus, tmp_path, capsys):
    for file in corpus.glob("train.*"):
        shutil.copy(file, tmp_path)
    with (tmp_path / f"train{suffix}").open("r+b") as f:
        f.truncate(100)
    error = refused(
        capsys, "train", tiny_run, f"run_dir={tmp_path / 'run'}", f"data.train={tmp_path / 'train'}"
    )
    assert f"train{suffix}" in error
    assert not (tmp_path / "run").exists()


def test_altered_corpus_is_refused_where_hashes_are_asked_for(tiny_run, corpus, tmp_path):
    for file in corpus.glob("train.*"):
        shutil.copy(file, tmp_path)
    with (tmp_path / "train.bin").open("r+b") as f:
        f.write(b"\7")
    run_dir = tmp_path / "run"
    overrides = [f"run_dir={run_dir}", f"data.train={tmp_path}/train", "parallel={pipe: 1}"]
    done = train(tiny_run, *overrides, "data.verify=hashes", processes=1)
    assert done.returncode == 2
    assert f"{tmp_path}/train.bin: sha256" in done.stderr and "Traceback" not in done.stderr
    assert [file.name for file in run_dir.iterdir()] == [".lock"]


def test_corpus_of_another_tokenizer_is_refused(tiny_run, corpus, tmp_path, capsys):
    other = shutil.copytree(corpus / "tokenizer", tmp_path / "other")
    with (other / "tokenizer.model").open("ab") as f:
        f.write(b"\0")
    error = refused(
        capsys, "train", tiny_run, f"run_dir={tmp_path / 'run'}", f"data.tokenizer={other}"
    )
    assert "tokenizer" in error


def test_run_directory_of_another_config_is_refused_and_stays(tiny_run, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    tree = yaml.safe_load(tiny_run.read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**tree, "run_dir": str(run_dir)}))
    (run_dir / "metrics.jsonl").write_text('{"step": 0}\n')
    before = (run_dir / "config.yaml").read_bytes()
    error = refused(capsys, "train", tiny_run, f"run_dir={run_dir}", "optimizer.lr=0.1", "seed=9")
    assert "optimizer.lr is 0.003 there and 0.1 here; seed is 3 there and 9 here." in error
    assert "neither extended nor altered: train another one in another run_dir" in error
    assert (run_dir / "config.yaml").read_bytes() == before


def test_overrides_may_follow_options(tiny_run, tmp_path, capsys):
    error = refused(
        capsys, "train", tiny_run, "--processes", "4", f"run_dir={tmp_path / 'r'}", "batch.micro=3"
    )
    assert "batch.micro=3" in error


def test_run_directory_in_use_is_refused(tiny_run, tmp_path, capsys):
    config = load_run(tiny_run, [f"run_dir={tmp_path / 'run'}"])
    with lock_run_dir(config):
        error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path / 'run'}")
    assert "trained by another process" in error


def test_folder_that_is_no_run_directory_is_refused(tiny_run, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path}")
    assert "no config.yaml" in error


@pytest.mark.parametrize("verb", ["train", "plan", "export", "report"])
def test_run_that_does_not_exist_is_refused(verb, tmp_path, capsys):
    assert "nowhere.yaml" in refused(capsys, verb, tmp_path / "nowhere.yaml")


def test_run_file_that_is_no_yaml_is_refused(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("steps: [1, 2")
    assert "not YAML" in refused(capsys, "train", tmp_path / "bad.yaml")


def test_export_without_a_checkpoint_is_refused(tiny_run, tmp_path, capsys):
    assert "no checkpoint" in refused(capsys, "export", tiny_run, f"run_dir={tmp_path / 'run'}")


def test_compiling_without_a_compiler_is_refused(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path / 'run'}", "compile=true")
    assert "no-such-compiler" in error and "compile=false" in error


def test_error_inside_the_launcher_is_said_once(tiny_run, tmp_path):
    # RANK is set as by a launcher of the user's own; the process is the second of two.
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = est_ds("train", tiny_run, f"run_dir={tmp_path / 'r'}", "batch.micro=3", **launched)
    assert (done.returncode, done.stderr, done.stdout) == (2, "", "")
    done = est_ds(
        "train", tiny_run, "batch.micro=3", **{**launched, "RANK": "0", "LOCAL_RANK": "0"}
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_empty_rank_in_the_environment_is_one_clear_error(tiny_run, tmp_path):
    done = est_ds("train", tiny_run, f"run_dir={tmp_path / 'r'}", RANK="", WORLD_SIZE="1")
    assert done.returncode == 2 and "RANK is '' in the environment" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "r").exists()


WELL_LAUNCHED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("RANK", "", "RANK is ''"),
        ("RANK", "one", "RANK is 'one'"),
        ("RANK", "2", "RANK is '2'"),
        ("RANK", "-1", "a whole number from 0 to 1"),
        ("WORLD_SIZE", None, "WORLD_SIZE is not set"),
        ("WORLD_SIZE", "0", "a whole number from 1 to"),
        ("WORLD_SIZE", "2.0", "WORLD_SIZE is '2.0'"),
        ("WORLD_SIZE", "9" * 5000, "WORLD_SIZE is '999"),
        ("LOCAL_RANK", None, "LOCAL_RANK is not set"),
        ("LOCAL_RANK", " 1", "LOCAL_RANK is ' 1'"),
        ("MASTER_PORT", None, "MASTER_PORT is not set"),
        ("MASTER_PORT", "65536", "a whole number from 1 to 65535"),
        ("MASTER_PORT", "0", "MASTER_PORT is '0'"),
        ("MASTER_ADDR", None, "MASTER_ADDR is not set"),
        ("MASTER_ADDR", "", "MASTER_ADDR is ''"),
    ],
)
def test_what_a_launcher_has_set_wrong_is_named(name, text, said, monkeypatch):
    for key, value in (WELL_LAUNCHED | {name: text}).items():
        monkeypatch.delenv(key, raising=False) if value is None else monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        meeting_place(World.from_environment())
    assert "Unset RANK" in str(error.value) and len(str(error.value)) < 400


def test_what_a_launcher_sets_is_read_and_counts_only_with_a_rank(monkeypatch):
    for key, value in WELL_LAUNCHED.items():
        monkeypatch.setenv(key, value)
    assert World.from_environment() == World(1, 2, 1)
    assert meeting_place(World.from_environment()) == ("node0", 29500)
    monkeypatch.delenv("RANK")
    assert World.from_environment() == World(0, 1, 0)


def test_nothing_of_the_refused_runs_is_left(tiny_run):
    assert sorted(p.name for p in Path(tiny_run).parent.iterdir()) == ["tiny.yaml"]


def foreign_copy(corpus, folder):
    """The training corpus as made elsewhere, in the field `data.train`."""
    for ending in ("bin", "idx"):
        shutil.copy(corpus / f"train.{ending}", folder)
    return f"data.train={folder}/train"


def test_a_token_that_the_model_lacks_is_named_with_its_corpus(tiny_run, corpus, tmp_path, capsys):
    train = foreign_copy(corpus, tmp_path)
    with (tmp_path / "train.bin").open("r+b") as f:
        f.write((777).to_bytes(2, "little"))
    error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path / 'run'}", train)
    assert f"corpus {tmp_path}/train: it holds the token 777" in error and "vocab_size=512" in error
    model = [
        "model={model_type: bert, vocab_size: 900, hidden_size: 64, num_hidden_layers: 4, "
        "num_attention_heads: 8, intermediate_size: 96, hidden_dropout_prob: 0.0, "
        "attention_probs_dropout_prob: 0.0}",
        "objective={name: mlm, vocabulary: 600}",
    ]
    error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path / 'run'}", train, *model)
    assert "it holds the token 777, but objective.vocabulary=600 is smaller" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("relies", ["data.documents=separate", "data.shuffle=documents"])
def test_documents_that_go_backwards_are_refused(relies, tiny_run, corpus, tmp_path, capsys):
    train = foreign_copy(corpus, tmp_path)
    run = [tiny_run, f"run_dir={tmp_path / 'run'}", train]
    with (tmp_path / "train.idx").open("r+b") as f:
        f.seek(-16, 2)
        f.write((10**9).to_bytes(8, "little"))
    prepare(load_run(run[0], run[1:]), 4)  # does not ask where documents begin
    assert "train.idx: its entries" in refused(capsys, "train", *run, relies)
    assert not (tmp_path / "run").exists()


def test_corpora_with_and_without_bos_are_refused(tiny_run, corpus, tmp_path, capsys):
    text, tokenizer = corpus / "text.valid.jsonl", corpus / "tokenizer"
    pack(text, tokenizer, tmp_path / "valid", "--no-bos")
    capsys.readouterr()
    mixed = ", ".join(f"{{corpus: {p}, weight: 1}}" for p in (corpus / "train", tmp_path / "valid"))
    for field in (f"data.valid={tmp_path}/valid", f"data.train=[{mixed}]"):
        error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path / 'run'}", field)
        assert "valid was packed with bos=None" in error and "bos=1" in error
