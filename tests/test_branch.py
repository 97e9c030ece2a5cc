"""A branch goes on from another run's checkpoint as one run would that had changed its mind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from cases.plans import GPT2
from conftest import ROOT, est_ds, refused, train
from est_ds import cli
from est_ds.checkpoints import first
from est_ds.checkpoints.index import read_index
from est_ds.checkpoints.reader import Checkpoint, damage
from est_ds.checkpoints.store import Store
from est_ds.config.run_config import RunConfig
from est_ds.config.run_file import load_run
from est_ds.data.order import positions
from est_ds.errors import UserError
from est_ds.plans.methods import build_method
from est_ds.report.page import write_report
from est_ds.report.summary import summarise
from est_ds.run.directory import FREE_TO_CHANGE, changed_fields
from est_ds.run.metrics import read_metrics
from est_ds.run.parent import read_parent
from est_ds.run.prepare import Run, prepare
from est_ds.training.branch import branch
from est_ds.training.inherit import MAY_CHANGE, STAYS, check_changes, check_depth
from est_ds.training.turns import Measured
from forks import fork, wait
from layouts import LAYOUTS, METHODS, train_in
from reference import assert_close, plain_adamw
from workers import train_all

SMALL = ["model.num_hidden_layers=2", "batch.micro=8"]
WSD = "schedule={name: wsd, warmup: 2, decay: 0}"
TRUNK = ["parallel={pipe: 1, zero: 0, processes: 1}", *SMALL, WSD, "method={name: full}"]
TRUNK += ["steps=8", "checkpoint.every=4", "evaluate={every: 4, sequences: 4}"]
AT = 4
# Two anneals, a run that ends otherwise than its parent, and one that does not.
BRANCHES = {
    "same": [],
    "anneal": ["schedule.decay=0.25"],
    "longer": ["steps=12", "schedule.decay=6", "schedule.shape=sqrt", "optimizer.weight_decay=0.1"],
}
KEPT = ("step", "loss", "grad_norm", "lr", "tokens", "plan_digest", "data_digest")


def lines(run: Path, start: int = 0) -> list[list]:
    """What training lines of a run say but for its times."""
    return [[e[k] for k in KEPT] for e in read_metrics(run)[0] if e["step"] >= start]


def weights(run: Path, step: int) -> dict:
    return read_index(run / "checkpoints" / f"step_{step:08d}").files


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("branch")


@pytest.fixture(scope="module")
def trunk(synthetic_run, folder) -> Path:
    job = {"run": synthetic_run, "overrides": [f"run_dir={folder}/trunk", *TRUNK]}
    train_all(folder / "log", 1, [job])
    return folder / "trunk"


@pytest.fixture(scope="module")
def branches(trunk, folder) -> dict[str, Path]:
    """Trained branches, after the parent is gone."""
    alone = shutil.copytree(trunk, folder / "alone")
    runs = {name: folder / name for name in BRANCHES}
    for name, run in runs.items():
        branch(str(alone), str(AT), str(run), BRANCHES[name])
    shutil.rmtree(alone)
    said = train_all(folder / "log", 1, [{"run": r, "overrides": []} for r in runs.values()])
    assert said.count(f"resuming at step {AT} of") == len(runs)
    return runs


def test_branch_that_changes_nothing_trains_what_its_parent_did(branches, trunk):
    assert lines(branches["same"]) == lines(trunk, AT)
    assert read_metrics(branches["same"])[1] == read_metrics(trunk)[1][1:]
    assert weights(branches["same"], 8) == weights(trunk, 8)  # moments too


@pytest.mark.parametrize("name", ["anneal", "longer"])
def test_anneals_of_one_trunk_equal_plain_adamw_that_decays_so(name, branches, trunk, tmp_path):
    """The rates before the branch are the trunk's: the decay of both begins after it."""
    config = load_run(branches[name])
    plain = {"start": None, "run_dir": str(tmp_path / "none")}
    expected = plain_adamw(config.model_copy(update=plain))
    steps, evaluations = read_metrics(branches[name])
    assert [e["step"] for e in steps] == list(range(AT, config.steps))
    assert_close([e["loss"] for e in steps], expected.losses[AT:])
    assert_close([e["grad_norm"] for e in steps], expected.norms[AT:], within=1e-4)
    held_out = [loss for step, loss in expected.held_out.items() if step > AT]
    assert_close([e["eval_loss"] for e in evaluations], held_out)
    assert [e["tokens"] for e in steps] == [512 * (e["step"] + 1) for e in steps]
    before = read_metrics(trunk)[0][AT - 1]["trained_s"]
    assert steps[-1]["trained_s"] == pytest.approx(before + sum(e["step_s"] for e in steps))
    assert len({e["lr"] for e in steps}) > 2


def test_report_and_plan_of_a_branch_are_of_its_own_steps(branches, capsys):
    summary = summarise(branches["longer"])
    assert [(p.from_step, p.until_step) for p in summary.phases] == [(AT, 12)]
    assert summary.tokens == 12 * 512 and summary.parent.step == AT
    assert f"alone at step {AT}" in write_report(branches["longer"]).read_text()
    cli.main(["plan", str(branches["longer"])])
    said = " ".join(capsys.readouterr().out.split())
    assert f"at step {AT}, {AT * 512:,} tokens behind it" in said


def test_phases_that_the_parent_trained_are_not_timed(trunk, tmp_path):
    phases = "{until: 2, layers: 1}, {until: 5, layers: 1}, {until: 8}"
    run = branched(trunk, tmp_path / "b", [f"method={{name: est, phases: [{phases}]}}"])
    turns = [turn.result([]) for turn in Measured("", run, engine=None, batches=[]).turns()]
    assert [(turn.phase, turn.num_steps) for turn in turns] == [(1, 1), (2, 3)]


def test_branch_of_a_branch_knows_both_parents(branches, tmp_path):
    text = branch(str(branches["anneal"]), "latest", str(tmp_path / "b"), ["steps=10"])
    assert "at step 8" in text and "steps: 8 -> 10" in text
    parent = read_parent(tmp_path / "b")
    assert (parent.step, parent.changed) == (8, {"steps": (8, 10)})
    assert parent.run_dir == str(branches["anneal"])
    assert (parent.parent.step, parent.parent.parent) == (AT, None)
    assert parent.parent.changed == {"schedule.decay": (0, 0.25)}
    config = load_run(tmp_path / "b")
    assert (config.start.step, config.start.tokens, config.start.reading) == (8, 4096, None)
    # Its own schedule never gave a step its rate: the one before is another run's.
    text = branch(str(tmp_path / "b"), "latest", str(tmp_path / "c"), ["steps=12"])
    assert f"the one before it is of {branches['anneal']}" in " ".join(text.split())


def test_what_is_kept_is_said_with_the_next_command(trunk, tmp_path, capsys):
    overrides = ["seed=4", "optimizer.lr=0.02"]
    cli.main(["branch", str(trunk), "--at", "4", "--run-dir", f"{tmp_path}/b", *overrides])
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "optimizer.lr: 0.01 -> 0.02",
        "AdamW's moments and its count of 4 steps",
        "anew: data",
        "in the order of another seed",
        "0.02 in step 4, 0.01 before it",
        f"go on: est-ds train {tmp_path}/b",
    ):
        assert text in said
    assert {p.name for p in (tmp_path / "b").iterdir()} == {
        *(".lock", "config.yaml", "parent.yaml", "checkpoints")
    }


# bad input

OLD = (
    "method={name: stacking, mode: double, phases: [{until: 6, layers: 1}, {until: 8, layers: 2}]}"
)
REFUSED = {
    "no such step": (["--at", "5"], ["checkpoint '5' is not in", "steps 4, 8"]),
    "nothing left to train": (["--at", "8"], ["steps=8", "nothing to train", "above 8"]),
    "another model": (["model.hidden_size=32"], ["model.hidden_size is 64 in the parent and 32"]),
    "more layers": (["model.num_hidden_layers=4"], ["model.num_hidden_layers", "of that model"]),
    "another vocabulary": (["model.vocab_size=640"], ["model.vocab_size is 512 in the parent"]),
    "another precision": (["precision=bf16"], ["precision is 'fp32' in the parent and 'bf16'"]),
    "fewer layers by then": ([OLD], ["'full') has 2 layers, [0, 1]", "'stacking' it would have 1"]),
    "run directory twice": (["run_dir=other"], ["override 'run_dir=other'", "--run-dir"]),
    "start by hand": (["start.step=2"], ["override 'start.step=2'", "--at"]),
    "unknown field": (["schedule.decai=0.1"], ["schedule.decai", "decay"]),
    "corpus that is not there": (["data.train=nowhere"], ["nowhere"]),
    "schedule that does not fit": (["schedule.decay=7"], ["schedule.decay = 9 steps"]),
    "batch that does not divide": (["batch.global=12"], ["batch.global=12", "batch.micro=8"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_branch_that_cannot_be_is_one_clear_error(case, trunk, tmp_path, capsys):
    arguments, named = REFUSED[case]
    at = [] if "--at" in arguments else ["--at", "4"]
    error = refused(capsys, "branch", trunk, *at, "--run-dir", tmp_path / "runs" / "b", *arguments)
    for text in named:
        assert text in error
    assert not list(tmp_path.iterdir())


def test_every_field_of_a_run_is_decided_on():
    decided = {p.partition(".")[0].rstrip("*") for p in (*FREE_TO_CHANGE, *MAY_CHANGE, *STAYS)}
    assert set(RunConfig.model_fields) - decided == {"start"}  # which overrides cannot set


def test_dropout_may_change_and_counts_of_elements_may_not_be_lost(trunk, tmp_path):
    new = ["model.attention_dropout=0.1", "optimizer.inactive=freeze"]
    branch(str(trunk), "4", str(tmp_path / "b"), new)
    there = load_run(tmp_path / "b")
    assert there.model["attention_dropout"] == 0.1
    here = load_run(tmp_path / "b", ["optimizer.inactive=zero_grad"])
    with pytest.raises(UserError, match="optimizer.inactive is 'freeze' in the parent and 'zero_"):
        check_changes(there, here, changed_fields(there, here), 4)


def test_directory_that_is_used_is_refused_and_stays(trunk, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    for new in (tmp_path, trunk, tmp_path / "thesis.txt"):
        error = refused(capsys, "branch", trunk, "--at", "4", "--run-dir", new)
        assert f"--run-dir='{new}' is there and no empty folder" in error
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    error = refused(
        capsys, "branch", trunk, "--at", "4", "--run-dir", tmp_path / "thesis.txt" / "b"
    )
    assert "cannot be made" in error
    error = refused(capsys, "branch", trunk, "--at", "4", "--run-dir", trunk / "b")
    assert "lies in the parent's directory" in error and not (trunk / "b").exists()


def test_tokenizer_of_the_same_size_is_another_one(trunk, tmp_path, capsys):
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    arguments = ("--run-dir", tmp_path / "b", f"data.tokenizer={tmp_path}")
    error = refused(capsys, "branch", trunk, "--at", "4", *arguments)
    assert f"data.tokenizer='{tmp_path}'" in error and "is not the tokenizer of the parent" in error


def test_damaged_or_vanished_checkpoint_is_refused(trunk, tmp_path, capsys, monkeypatch):
    parent = shutil.copytree(trunk, tmp_path / "parent")
    arguments = ("branch", parent, "--at", "4", "--run-dir", tmp_path / "b")
    file = parent / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    error = refused(capsys, *arguments)
    assert "step_00000004 is damaged: rank_00000.safetensors is not what was written" in error
    file.unlink()  # as a run does that keeps the newest only
    assert "was removed meanwhile" in refused(capsys, *arguments)
    (file.parent / "checkpoint.json").write_text("{}")
    assert "is damaged: checkpoint.json" in refused(capsys, *arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["parent"]


def test_branch_without_its_checkpoint_does_not_begin_anew(trunk, tmp_path):
    branch(str(trunk), "4", str(tmp_path / "b"), [])
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    done = train(tmp_path / "b", processes=1)
    assert done.returncode == 2 and "start.step=4" in done.stderr
    assert "holds none: put it back" in done.stderr


# the file system


def test_files_are_copied_where_they_cannot_be_linked(trunk, tmp_path, monkeypatch):
    def no_link(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    assert "(1 linked, 0 copied)" in branch(str(trunk), "4", str(tmp_path / "linked"), [])
    monkeypatch.setattr(os, "link", no_link)
    assert "(0 linked, 1 copied)" in branch(str(trunk), "4", str(tmp_path / "copied"), [])
    for name, is_linked in (("linked", True), ("copied", False)):
        checkpoint = tmp_path / name / "checkpoints" / "step_00000004"
        assert damage(checkpoint) is None
        file = "checkpoints/step_00000004/rank_00000.safetensors"
        assert (tmp_path / name / file).samefile(trunk / file) == is_linked
        assert Store(checkpoint.parent).latest == 4


def killed_at(seam: str, arguments: list[str]) -> None:
    """Runs a verb that is killed where it would call a function."""
    setattr(
        os if seam in ("link", "rename") else first,
        seam,
        lambda *given: os.kill(os.getpid(), signal.SIGKILL),
    )
    cli.main(arguments)


def test_killed_anywhere_a_branch_is_absent_and_made_by_the_next_call(trunk, tmp_path):
    new = tmp_path / "runs" / "b"
    arguments = ["branch", str(trunk), "--at", "4", "--run-dir", str(new)]
    streams = (tmp_path / "out", tmp_path / "out")
    for seam in ("link", "replace_text", "write_parent", "write_config", "rename"):
        killed = fork(killed_at, (seam, arguments), streams, ROOT, dict(os.environ))
        assert wait([killed], 120) == [-signal.SIGKILL], (tmp_path / "out").read_text()
        assert not new.exists() and (new.parent / ".b.partial").is_dir()
    branch(str(trunk), "4", str(new), [])
    assert [p.name for p in new.parent.iterdir()] == ["b"]
    assert damage(new / "checkpoints" / "step_00000004") is None


# where a branch goes on in the data


def branched(trunk: Path, new: Path, overrides: list[str]) -> Run:
    branch(str(trunk), str(AT), str(new), overrides)
    return prepare(load_run(new), 1)


def windows_of(run: Run, corpus: int, steps: int) -> list[int]:
    """Windows of a corpus that steps from the branch on read, in their order."""
    found = []
    for step in range(AT, AT + steps):
        corpora, _, ids = run.train.samples(step)
        found += ids[corpora == corpus].tolist()
    return found


def test_larger_batch_goes_on_behind_what_was_read(trunk, tmp_path):
    run = branched(trunk, tmp_path / "b", ["batch.global=24"])
    seed, total = run.config.seed, run.train.corpora[0].num_samples
    expected = positions(8 * AT, 24 * 3, total, seed).tolist()
    assert windows_of(run, 0, 3) == expected
    assert run.config.tokens_after(AT + 1) == (8 * AT + 24) * 64
    again = branched(tmp_path / "b", tmp_path / "c", ["optimizer.lr=0.1"])
    assert windows_of(again, 0, 3) == expected  # a branch of it counts from the same place


def test_tokens_of_a_branch_are_its_own_and_its_parents(trunk, tmp_path):
    """The trunk read 4 steps of 512; a step of the branch reads 1,536."""
    run = branched(trunk, tmp_path / "b", ["batch.global=24", f"tokens={4 * 512 + 2 * 1536 + 1}"])
    assert run.config.steps == AT + 3
    again = branched(tmp_path / "b", tmp_path / "c", [f"tokens={4 * 512 + 2 * 1536}"])
    assert again.config.steps == AT + 2
    with pytest.raises(UserError, match="steps=4 leaves a branch at step 4 nothing to train"):
        branch(str(trunk), str(AT), str(tmp_path / "d"), ["tokens=2048"])


def test_another_corpus_is_read_from_its_start(trunk, tmp_path):
    config = load_run(trunk)
    parts = [f"{{corpus: {config.data.valid}, weight: 0.5}}"]
    parts.insert(0, f"{{corpus: {config.data.train}, weight: 0.5}}")
    other = f"data.valid={{own: {config.data.train}}}"
    mixed = branched(trunk, tmp_path / "mixed", [f"data.train=[{', '.join(parts)}]"])
    alone = branched(trunk, tmp_path / "alone", [f"data.train={config.data.valid}", other])
    seed = config.seed
    totals = [w.num_samples for w in mixed.train.corpora]
    # Half of each batch; the old corpus goes on, the new one begins.
    assert windows_of(mixed, 0, 2) == positions(8 * AT, 8, totals[0], seed).tolist()
    assert windows_of(mixed, 1, 2) == positions(0, 8, totals[1], seed, corpus=1).tolist()
    assert windows_of(alone, 0, 2) == positions(0, 16, totals[1], seed).tolist()


def test_phases_that_tell_the_history_need_no_other_start(trunk, tmp_path):
    """Written out from step 0, the same data are what the two corpora of a run would be."""
    config = load_run(trunk)
    data = f"data.train=[{{corpus: {config.data.train}}}, {{corpus: {config.data.valid}}}]"
    phases = f"data.phases=[{{until: {AT}, weights: [1, 0]}}, {{until: 8, weights: [1, 3]}}]"
    run = branched(trunk, tmp_path / "b", [data, phases])
    assert run.config.start.reading is None
    assert Counter(run.train.samples(AT)[0].tolist()) == {0: 2, 1: 6}
    assert windows_of(run, 1, 1) == positions(0, 6, run.train.corpora[1].num_samples, 3, 1).tolist()


def test_sequences_cut_otherwise_and_other_seeds_begin_anew(trunk, tmp_path):
    for name, overrides in {"cut": ["data.sequence=32"], "seed": ["seeds.data=9"]}.items():
        run = branched(trunk, tmp_path / name, overrides)
        seed, total = run.config.seed_of("data"), run.train.corpora[0].num_samples
        assert windows_of(run, 0, 2) == positions(0, 16, total, seed).tolist()
        assert run.config.tokens_after(AT) == 512 * AT


# methods that grow

STACKING = dict(name="stacking", mode="double", balance_groups=2)
DEPTHS = [dict(until=40, layers=3), dict(until=70, layers=6), dict(until=100, layers=12)]


def stacked(**changes):
    section = STACKING | dict(phases=DEPTHS) | changes
    return build_method(section, seed=0, steps=100, shape=GPT2)


FULL = dict(name="full")


@pytest.mark.parametrize(
    ("there", "here", "step", "fits"),
    [
        (stacked(), stacked(mode="interleave"), 50, True),
        (stacked(), stacked(mode="random"), 40, True),  # the growth is still to come
        (stacked(), stacked(phases=[DEPTHS[1] | dict(until=40), DEPTHS[2]]), 41, False),
        (stacked(), stacked(balance_groups=3), 50, False),  # as many layers, in other places
        (stacked(), build_method(FULL, seed=0, steps=100, shape=GPT2), 70, False),
        (stacked(), build_method(FULL, seed=0, steps=100, shape=GPT2), 71, True),
        (stacked(), stacked(), 0, True),
    ],
)
def test_method_must_have_the_layers_of_the_parent(there, here, step, fits):
    if fits:
        check_depth(there, here, step)
    else:
        with pytest.raises(UserError, match=f"after {step} steps the model of the parent"):
            check_depth(there, here, step)


@pytest.mark.slow
def test_growth_chosen_at_the_branch_is_that_of_a_run_with_it(synthetic_run, tmp_path):
    """Before it grows, a run does not depend on how it will: so the other run is the oracle."""
    growing = {
        mode: f"method={{name: stacking, mode: {mode}, moments: fresh, "
        f"phases: [{{until: 8, layers: 4}}, {{until: 20, layers: 8}}]}}"
        for mode in ("double", "interleave")
    }
    layout = "data 2, ZeRO 1"
    runs = train_in(tmp_path, synthetic_run, [(layout, m, [o]) for m, o in growing.items()])
    branch(str(runs[0]), "8", str(tmp_path / "b"), [growing["interleave"]])
    branch(str(runs[0]), "10", str(tmp_path / "frozen"), ["optimizer.inactive=freeze", "steps=21",
           "method.phases.1.until=21"])  # fmt: skip
    jobs = [{"run": tmp_path / n, "overrides": []} for n in ("b", "frozen")]
    train_all(tmp_path / "log", 2, jobs)
    assert lines(tmp_path / "b") == lines(runs[1], 8) != lines(runs[0], 8)
    assert weights(tmp_path / "b", 20) == weights(runs[1], 20)
    # Elements that begin to count by themselves have done the steps since they began.
    with Checkpoint(tmp_path / "frozen" / "checkpoints" / "step_00000021") as held:
        name = "model.layers.{}.mlp.down_proj.weight"
        counts = [held.read(name.format(i), "active_steps", 0, 96).max().item() for i in (0, 4)]
    assert counts == [21, 13]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "here", "method"),
    [
        ("data 2, ZeRO 1", "pipe 2 x data 2, ZeRO 1", "est"),
        ("pipe 2 x data 2, ZeRO 1", "data 2, ZeRO 3", "est"),
    ],
)
def test_branch_in_another_layout_goes_on_the_same(there, here, method, in_layouts, tmp_path):
    parent = in_layouts[there, method, "fp32"]
    processes, layout = LAYOUTS[here]
    branch(str(parent), "10", str(tmp_path / "b"), layout)
    branch(str(parent), "10", str(tmp_path / "dense"), [*layout, f"method={METHODS['full']}"])
    jobs = [{"run": tmp_path / n, "overrides": []} for n in ("b", "dense")]
    train_all(tmp_path / "log", processes, jobs)
    steps, evaluations = read_metrics(tmp_path / "b")
    expected, expected_evaluations = read_metrics(parent)
    assert_close([e["loss"] for e in steps], [e["loss"] for e in expected[10:]])
    assert_close([e["eval_loss"] for e in evaluations], [expected_evaluations[-1]["eval_loss"]])
    dense, _ = read_metrics(tmp_path / "dense")
    assert {e["kept_layers"] for e in dense} == {8}
    assert summarise(tmp_path / "dense").saved_model == pytest.approx(0)


@pytest.mark.slow
def test_a_branch_trains_and_exports_as_any_run(trained, tmp_path):
    run = tmp_path / "b"
    branch(str(trained), "15", str(run), ["optimizer.lr=1e-3"])
    done = train(run, "parallel={pipe: 1}", processes=1)
    assert done.returncode == 0, done.stderr
    assert f"branch of        {trained} at step 15" in done.stdout
    for checkpoint in ("15", "latest"):
        done = est_ds("export", run, "--checkpoint", checkpoint, "--out", tmp_path / checkpoint)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_branch_is_verified_from_its_start(branches):
    """The short run has no step 0 to 3 behind it: only its config counts."""
    done = est_ds("verify-resume", branches["longer"], "--steps", "4", timeout=900)
    assert done.returncode == 0, done.stderr
    assert "PASS" in done.stdout
