"""`est-ds verify-resume` passes what resumes exactly, and names the first step that does not."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import est_ds
from est_ds import cli
from est_ds.checkpoints.index import FILE, read_index
from est_ds.config.run_file import load_run
from est_ds.design import make_design
from est_ds.disk import describe
from est_ds.verify_resume.compare import Bounds, compare_runs
from est_ds.verify_resume.short import default_cut, shortened
from est_ds.verify_resume.verify import OTHER_LAYOUT, ResumeCheck

ONE = ["parallel.pipe=1", "--processes", "1"]
OWN = ["seeds={model: 1, data: 2, method: 4}", "method.phases.1.lr=0.5", "optimizer.decay=all"]
OWN += ["schedule={name: linear, rewarm: {steps: 4}}", "model.init={residual: tinyllama}"]


@pytest.mark.slow
def test_killed_run_resumes_identically_in_its_own_layout(tiny_run, tmp_path):
    """RUN is a run directory here, which is read and left alone; everything has a seed of its own,
    and the rate changes at boundaries."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(tiny_run.read_text())
    done = est_ds("verify-resume", run_dir, *ONE, *OWN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 steps (phases: small 0-5, narrow 5-8, full 8-12)" in done.stdout
    assert "its last checkpoint of step 6" in done.stdout
    assert done.stdout.endswith("PASS: every step, weight and moment is identical\n")
    assert [p.name for p in run_dir.iterdir()] == ["config.yaml"]


def test_killed_run_resumes_within_the_bounds_in_another_layout(tiny_run, tmp_path):
    done = est_ds(
        "verify-resume",
        tiny_run,
        *ONE,
        "--steps",
        "8",
        "--at",
        "3",
        "--keep",
        tmp_path / "kept",
        "--then",
        "parallel.zero=3",
        "--then-processes",
        "2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming on 2 processes (pipe 1, ZeRO 3)" in done.stdout
    assert "PASS: within the bounds" in done.stdout
    layouts = [
        read_index(tmp_path / "kept" / name / "checkpoints" / "step_00000008").layout
        for name in ("uninterrupted", "interrupted")
    ]
    assert [(layout["zero"], layout["replicas"]) for layout in layouts] == [(1, 1), (3, 2)]


def tamper(checkpoint: Path, key: str, factor: float) -> None:
    """Scales one tensor of a checkpoint, with the hashes that belong to it."""
    [name] = read_index(checkpoint).files
    tensors = load_file(checkpoint / name)
    tensors[key] *= factor
    save_file(tensors, checkpoint / name)
    index = read_index(checkpoint)
    changed = index.model_copy(update={"files": {name: describe(checkpoint / name)}})
    (checkpoint / FILE).write_text(changed.to_json())


@pytest.mark.slow
def test_moment_lost_between_the_halves_is_named_with_the_first_step(tiny_run, monkeypatch, capsys):
    """A step is trained from its weights: a wrong moment shows in the next one's loss."""
    resume = ResumeCheck.resume

    def tampered(check: ResumeCheck) -> None:
        checkpoint = check.interrupted / "checkpoints" / f"step_{check.cut:08d}"
        tamper(checkpoint, "exp_avg:0:lm_head.weight", 0.0)
        resume(check)

    monkeypatch.setattr(ResumeCheck, "resume", tampered)
    with pytest.raises(SystemExit) as e:
        cli.main(["verify-resume", str(tiny_run), *ONE])
    said = capsys.readouterr().out
    assert e.value.code == 1
    [line] = [line for line in said.splitlines() if line.startswith("DIFFERENT")]
    assert line.startswith("DIFFERENT from step 7: loss is ")
    assert "in the uninterrupted run and" in line and "allowed 0)" in line


@pytest.mark.slow
def test_run_that_begins_anew_is_no_resumed_run(tiny_run, monkeypatch, capsys):
    """It would equal the uninterrupted one in everything."""
    resume = ResumeCheck.resume

    def without_checkpoint(check: ResumeCheck) -> None:
        shutil.rmtree(check.interrupted / "checkpoints")
        (check.interrupted / "metrics.jsonl").unlink()  # which says that there were checkpoints
        resume(check)

    monkeypatch.setattr(ResumeCheck, "resume", without_checkpoint)
    with pytest.raises(SystemExit) as e:
        cli.main(["verify-resume", str(tiny_run), *ONE, "--steps", "8"])
    assert e.value.code == 1
    assert "did not resume from step" in capsys.readouterr().err


def edited(run: Path, target: Path, step: int, **changes) -> Path:
    """A copy of a run with another line in its metrics."""
    shutil.copytree(run, target)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == step and "loss" in line:
            line.update(changes)
    (target / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plan_digest", "0" * 16),
        ("data_digest", "0" * 16),
        ("lr", 1.0),
        ("loss", 9.0),
        ("grad_norm", 9.0),
        ("phase", "other"),
    ],
)
def test_every_quantity_counts_and_the_earliest_is_named(field, value, trained, tmp_path):
    other = edited(trained, tmp_path / "other", 11, **{field: value})
    later = edited(other, tmp_path / "later", 15, loss=1.0)
    first = compare_runs(trained, later, OTHER_LAYOUT["fp32"]).first
    assert (first.step, first.quantity, first.found) == (11, field, value)
    assert compare_runs(trained, trained, Bounds()).first is None


def test_difference_within_the_bound_counts_only_where_bits_must_be_the_same(trained, tmp_path):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    loss = next(line["loss"] for line in lines if line["step"] == 11)
    other = edited(trained, tmp_path / "other", 11, loss=loss * (1 + 1e-6))
    assert compare_runs(trained, other, OTHER_LAYOUT["fp32"], exact_until=11).first is None
    assert compare_runs(trained, other, OTHER_LAYOUT["fp32"], exact_until=12).first.step == 11


def test_weights_and_moments_count(trained, tmp_path):
    other = shutil.copytree(trained, tmp_path / "other")
    checkpoint = other / "checkpoints" / "step_00000014"
    name = "rank_00000.safetensors"
    tensors = load_file(checkpoint / name)
    key = next(k for k in tensors if k.startswith("exp_avg_sq:0:"))
    tensors[key][3] += 1.0
    save_file(tensors, checkpoint / name)
    first = compare_runs(trained, other, OTHER_LAYOUT["fp32"]).first
    assert first.step == 13 and math.isclose(first.found, first.expected + 1.0, rel_tol=1e-6)
    assert first.quantity == f"exp_avg_sq of {key.split(':', 2)[2]}[3]"


@pytest.mark.parametrize(
    ("method", "steps", "ends", "cut"),
    [
        ("{name: full}", None, [12], 6),
        ("{name: static, until: 10, layers: 0.5}", None, [6, 12], 4),
        ("{name: raptr, phases: [{until: 1, layers: 0.5}, {until: 20}]}", 20, [1, 20], 1),
        ("{name: raptr, phases: [{until: 0.5, layers: 0.5}, {until: 1.0}]}", 4, [2, 4], 1),
    ],
)
def test_short_run_has_all_phases_and_is_cut_before_a_boundary(method, steps, ends, cut, tiny_run):
    short = shortened(load_run(tiny_run, [f"method={method}"]), steps)
    phases = make_design(short).method.phases
    assert [phase.until_step for phase in phases] == ends
    assert default_cut(phases, short.steps) == cut


def test_phases_of_the_data_move_with_the_others(tiny_run):
    corpus = load_run(tiny_run).data.train
    parts = f"[{{corpus: {corpus}}}, {{corpus: {corpus}2}}]"
    phases = "[{until: 10, weights: [1, 2]}, {until: 1.0, weights: [2, 1]}]"
    config = load_run(tiny_run, [f"data.train={parts}", f"data.phases={phases}"])
    assert [phase.until for phase in shortened(config, 12).data.phases] == [0.5, 1.0]


REFUSED = {
    "another run": (["--then", "seed=4"], ["--then", "seed is 3 there and 4 here"]),
    "a layout that does not fit": (["--then", "parallel.pipe=3"], ["parallel.pipe=3"]),
    "more steps than the run": (["--steps", "21"], ["--steps=21", "20"]),
    "fewer steps than phases": (["--steps", "2"], ["phases must increase", "--steps"]),
    "a checkpoint behind the end": (["--steps", "8", "--at", "8"], ["--at=8", "1 to 7"]),
    "unknown field": (["--then", "parallel.pip=1"], ["parallel.pip"]),
}


@pytest.mark.parametrize(("arguments", "named"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_anything_starts(arguments, named, tiny_run, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["verify-resume", str(tiny_run), *arguments])
    said = capsys.readouterr()
    assert e.value.code == 2 and not said.out
    assert all(text in said.err for text in named), said.err


def test_runs_are_kept_only_in_an_empty_folder(tiny_run, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit) as e:
        cli.main(["verify-resume", str(tiny_run), "--keep", str(tmp_path)])
    assert e.value.code == 2 and "not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
