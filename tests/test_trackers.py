"""Trackers show what `metrics.jsonl` says, once, whatever became of the run or of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import time
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from cases.tiny import make_config
from conftest import ROOT, refused, tensorboard_points, train
from est_ds.config.run_file import load_run
from est_ds.design import make_design
from est_ds.engine.events import count_steps
from est_ds.run import tracker_kinds
from est_ds.run.directory import write_config
from est_ds.run.metrics import read_lines, read_metrics
from est_ds.run.tracker_kinds import KINDS, describe_run, git_revision
from est_ds.run.trackers import Trackers, point_of

ALONE = ("parallel={pipe: 1, zero: 1, processes: 1}",)
LINES = [
    {"step": i, "loss": 9.0 - i, "start": 0, "flops_active": 1.0, "flops_dense": 2.0}
    for i in range(6)
]
slow = pytest.mark.slow


def method(**changes):
    return make_design(make_config(**changes)).method


def track(
    run_dir: Path, start: int, known: int, sent: list[dict], *changes: int, **of_run
) -> list[str]:
    """Tracks lines in one start of a run that has logged `known` lines; returns what was said.

    Args:
        changes: before these lines the run goes back to the step of the next line.
        of_run: sections of the run.
    """
    config, said = make_config(run_dir=str(run_dir), **of_run), []
    trackers = Trackers(config, method(), start, lambda: LINES[:known], said.append)
    for i, line in enumerate(sent):
        if i in changes:
            trackers.go_back(line["step"])
        trackers.send(line)
    trackers.close(ended_well=True)
    return said


def test_points_are_the_numbers_of_a_line_over_steps_done():
    of = method()
    spike = {**LINES[5], "spike": "what", "clipped": True, "plan_digest": "1f", "lr": float("nan")}
    point = point_of({**spike, "layout": {"pipe": 1}}, of)
    assert (point.kind, point.done) == ("train", 6)
    assert point.figures == {
        **{"train/loss": 4.0, "train/clipped": 1.0, "train/phase": 1.0},
        **{"train/flops_active": 1.0, "train/flops_dense": 2.0, "train/flops_ratio": 0.5},
    }
    line = {"step": 9, "eval_loss": 2.0, "eval_layers": 4, "eval_losses": {"code": 1.5}}
    point = point_of(line, of)
    assert (point.kind, point.done) == ("eval", 10)
    assert point.figures == {"eval/loss": 2.0, "eval/layers": 4.0, "eval/loss/code": 1.5}
    line = {"step": 5, "boundary": "after", "phase": "full", "plans": 4}
    point = point_of({**line, "full_loss": 3.0, "subnetwork_loss": 4.0}, of)
    assert (point.kind, point.done) == ("boundary/after", 5)
    assert set(point.figures.values()) == {3.0, 4.0}
    assert point_of({"step": 3, "skipped": "why"}, of) is None


def test_a_tracker_gets_what_it_missed_and_a_rollback_doubles_nothing(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    # From step 3 on: the first three lines were written before the tracker was asked for.
    assert track(run_dir, 3, 3, LINES[3:5]) == []
    assert tensorboard_points(run_dir)["train/loss"] == [1, 2, 3, 4, 5]
    # The run was killed and goes on from step 4; then it goes back to step 4 once more.
    assert track(run_dir, 4, 4, [*LINES[4:6], *LINES[4:6]], 2) == []
    assert tensorboard_points(run_dir)["train/loss"] == [1, 2, 3, 4, 5, 6]
    assert json.loads((run_dir / "trackers" / "tensorboard.json").read_text()) == {
        "run": "tensorboard",
        "sent": {"train": 6},
    }


def test_a_tracker_that_fails_says_so_once_and_the_next_start_fills_in(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "tensorboard").write_text("no folder")
    [said] = track(run_dir, 0, 0, LINES)
    assert said.startswith("warning: log.to=tensorboard failed after step 0: FileExistsError")
    (run_dir / "tensorboard").unlink()
    assert track(run_dir, 4, 4, LINES[4:]) == []
    assert tensorboard_points(run_dir)["train/loss"] == [1, 2, 3, 4, 5, 6]


def test_what_a_tracker_or_a_monitor_raises_is_said_without_its_password(
    tmp_path, monkeypatch, capsys
):
    """MLflow's errors name the whole URI."""

    def fail(*_given):
        raise OSError("API request to https://me:s3cret@host/api\n failed")

    monkeypatch.setattr(KINDS["tensorboard"], "start", fail)
    [said] = track(tmp_path, 0, 0, LINES)
    assert "OSError: API request to https://...@host/api failed" in said and "s3cret" not in said
    monitor = SimpleNamespace(write_events=fail, enabled=True)
    count_steps(monitor, 1)
    monitor.write_events([("mine", 1.0, 1)])
    shown = capsys.readouterr().out
    assert "https://...@host/api failed" in shown and "s3cret" not in shown
    assert not monitor.enabled


def test_a_full_disk_of_a_tracker_ends_no_training(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    board = run_dir / "tensorboard"
    board.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(board)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, and leave to mount a file system")
    try:
        write_config(load_run(tiny_run, [f"run_dir={run_dir}", *ALONE]))
        done = train(run_dir, processes=1)
    finally:
        subprocess.run(["umount", str(board)], check=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: ") == 1 and done.stderr == ""
    assert "log.to=tensorboard failed" in done.stdout and "No space left" in done.stdout
    assert len(read_metrics(run_dir)[0]) == 20


def test_a_missing_package_is_one_clear_error_before_anything_starts(
    tiny_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tracker_kinds, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow", "trackio"):
        said = refused(capsys, "train", tiny_run, f"run_dir={tmp_path}/run", f"log.to=[{name}]")
        assert f"log.to={name}: " in said and f"pip install 'est_ds[{name}]'" in said
    assert not (tmp_path / "run").exists()


def test_trackers_know_config_phases_versions_and_revision(tmp_path):
    config = make_config(method={"name": "full"})
    about = describe_run(config, method(method={"name": "full"}).phases)
    assert about["optimizer.lr"] == 1e-3 and about["model.hidden_size"] == 64
    assert about["phases.0"] == "full: steps 1-20" and about["versions.torch"]
    shutil.copytree(ROOT / "est_ds" / "ranks", tmp_path / "code")
    git = ["git", "-C", str(tmp_path / "code"), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    file = tmp_path / "code" / "world.py"
    assert git_revision(file) is None
    for words in (["init", "-q"], ["add", "world.py"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert git_revision(file) == commit.strip()
    file.write_text("")
    assert git_revision(file) == f"{commit.strip()}-dirty"
    assert git_revision(tmp_path / "code" / "verdict.py") is None


def kill_before(step: int, trackers: Path, names: list[str]) -> None:
    """Has this process end at a step as if the machine had been switched off, once trackers had
    what was on its way, but for the row that W&B is still to get."""
    from est_ds.training import loop

    train_step = loop.train_step

    def sent(name: str) -> int:
        file = trackers / f"{name}.json"
        return json.loads(file.read_text())["sent"].get("train", 0) if file.exists() else 0

    def killed(job, at: int) -> bool:
        if at == step:
            end = time.monotonic() + 200
            while min(sent(name) + (name == "wandb") for name in names) < step:
                assert time.monotonic() < end
                time.sleep(0.1)
            time.sleep(10)  # trackio sends on a thread of its own
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(job, at)

    loop.train_step = killed


EXTRAS = [name for name in KINDS if name != "tensorboard"]


def is_here(name: str) -> bool:
    return all(map(find_spec, KINDS[name].modules()))


@pytest.fixture(scope="module")
def resumed(tiny_run, tmp_path_factory) -> Path:
    """A run that was killed before step 13, and went on from step 10, with all trackers there
    are."""
    folder = tmp_path_factory.mktemp("tracked")
    names = ["tensorboard", *filter(is_here, EXTRAS)]
    given = [f"run_dir={folder}/run", *ALONE, f"log.to=[{', '.join(names)}]"]
    given += ["log.project=a project"] * (len(names) > 1)
    kill = partial(kill_before, 13, folder / "run" / "trackers", names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        first = train(tiny_run, *given, processes=1, first=kill)
        assert first.returncode == -signal.SIGKILL, first.stderr
        again = train(tiny_run, *given, processes=1)
    assert again.returncode == 0, again.stderr
    assert "resuming at step 10" in again.stdout
    assert "warning: " not in first.stdout + again.stdout
    return folder / "run"


def wandb_rows(run_dir: Path) -> list[dict]:
    """What the files of an offline run hold, both starts together."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        data, at, record = file.read_bytes(), 7, b""  # LevelDB's log format, after a header
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, size, kind = struct.unpack_from("<IHB", data, at)
            record, at = record + data[at + 7 : at + 7 + size], at + 7 + size
            if kind in (1, 4):  # whole, or its last part
                found.append(Record.FromString(record))
                record = b""
    return [
        {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
        for r in found
        if r.WhichOneof("record_type") == "history"
    ]


def of_wandb(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    assert len({f.name for f in run_dir.glob("wandb/offline-run-*/*.wandb")}) == 1  # its id
    rows = wandb_rows(run_dir)
    names = {name for row in rows for name in row if "/" in name}
    return {n: [(row["_step"], row[n]) for row in rows if n in row] for n in names}


def of_mlflow(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir}/mlflow.db")
    [experiment] = [e for e in client.search_experiments() if e.name == "a project"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.003"
    assert len(run.data.tags["git_revision"].removesuffix("-dirty")) == 40
    histories = {n: client.get_metric_history(run.info.run_id, n) for n in run.data.metrics}
    return {n: sorted((m.step, m.value) for m in h) for n, h in histories.items()}


def of_trackio(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    [file] = run_dir.parent.glob("trackio/*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
        [(config,)] = base.execute("select config from configs").fetchall()
    assert len({row[0] for row in rows}) == 1
    assert json.loads(config)["optimizer.lr"] == 0.003
    rows = [(step, json.loads(metrics)) for _, step, metrics in rows]
    names = {name for _, metrics in rows for name in metrics}
    return {n: [(step, metrics[n]) for step, metrics in rows if n in metrics] for n in names}


def needs(name: str):
    reason = f"{name} is not installed here: pip install -e '.[{name}]'"
    return pytest.param(name, marks=pytest.mark.skipif(not is_here(name), reason=reason))


@slow
@pytest.mark.parametrize("name", [needs("mlflow")])
def test_mlflow_gets_what_a_kill_lost_on_its_way(name, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracker_kinds, "LIMIT_S", 300.0)  # its first database takes long
    run_dir, log = tmp_path / "run", {"to": [name]}
    run_dir.mkdir()
    assert track(run_dir, 0, 0, LINES[:3], log=log) == []
    file = run_dir / "trackers" / "mlflow.json"
    mark = json.loads(file.read_text())
    assert mark["sent"] == {"train": 3}
    file.write_text(json.dumps(mark | {"sent": {"train": 4}}))  # and killed before it was sent
    assert track(run_dir, 2, 2, LINES[2:], log=log) == []
    points = MlflowClient(f"sqlite:///{run_dir}/mlflow.db").get_metric_history(
        mark["run"], "train/loss"
    )
    assert sorted((p.step, p.value) for p in points) == [(i + 1, 9.0 - i) for i in range(6)]


@slow
@pytest.mark.parametrize("name", [needs("trackio")])
def test_a_folder_that_trackio_cannot_write_is_said_and_nothing_counts_as_sent(
    name, tmp_path, monkeypatch
):
    from trackio import utils

    (tmp_path / "run").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path / "file" / "below")
    [said] = track(tmp_path / "run", 0, 0, LINES, log={"to": [name]})
    assert "log.to=trackio failed" in said and str(tmp_path / "file") in said
    assert not (tmp_path / "run" / "trackers" / "trackio.json").exists()


@slow
@pytest.mark.parametrize("name", [needs(name) for name in EXTRAS])
def test_a_killed_and_resumed_run_is_one_run_with_every_point_once(name, resumed):
    found = {"wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio}[name](resumed)
    of = make_design(make_config()).method
    expected: dict[str, dict[int, float]] = {}
    for line in read_lines(resumed):
        point = point_of(line, of)
        for figure, value in point.figures.items():
            expected.setdefault(figure, {})[point.done] = value
    assert found.keys() == expected.keys()
    for figure, points in found.items():
        doubled = [step for step, n in Counter(step for step, _ in points).items() if n > 1]
        assert not doubled and [step for step, _ in points] == list(expected[figure]), figure
    exact = ("train/loss", "train/grad_norm", "eval/loss")  # others hold times
    for figure in exact:
        assert dict(found[figure]) == pytest.approx(expected[figure], rel=1e-6)
    assert tensorboard_points(resumed)["train/loss"] == list(range(1, 21))
