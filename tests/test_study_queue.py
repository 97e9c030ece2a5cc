"""`est-ds compare` while it trains: what it survives, how long it says it takes, where runs go."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import est_ds
from est_ds.config.run_file import load_run
from est_ds.cost.flops import Flops
from est_ds.errors import UserError
from est_ds.launch.signals import Signals
from est_ds.run.metrics import read_metrics
from est_ds.run.windows import read_windows
from est_ds.studies import queue
from est_ds.studies.collect import collect
from est_ds.studies.compare import Wish, open_study
from est_ds.studies.queue import Places, Running, Watcher, on_gpus, train_all
from est_ds.studies.results import Results, read_results
from est_ds.studies.runs import Runs, StudyRun, key_of
from est_ds.studies.study_file import load_study
from est_ds.studies.todo import START_S, expected_s
from made_studies import DENSE, HALF_LAYERS, LAYERS, answered, dense_loss, result_of
from namespaces import wait_until

START_LIMIT_S = 240.0


def test_a_study_that_is_killed_goes_on_and_trains_no_finished_run_again(write_study, tmp_path):
    arms = {"dense": DENSE}
    arms["faster"] = {**DENSE, "optimizer.lr": 5e-3}
    small = {"steps": 8, "parallel": {"pipe": 1, "processes": 1}, "checkpoint.every": 4}
    file = write_study(arms=arms, seeds=[0], intervals=False, budgets=["tokens"], set=small)
    results = tmp_path / "study" / "results.jsonl"
    command = [sys.executable, "-m", "est_ds.cli", "compare", str(file), "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    begun = tmp_path / "study" / "faster" / "seed_0" / "train.log"
    wait_until(lambda: begun.exists() and b"starting at step" in begun.read_bytes(), START_LIMIT_S)
    process.kill()
    process.wait()
    # As a kill in the middle of a line leaves it.
    with results.open("a") as f:
        f.write('{"run": {"run": "12')
    done = est_ds("compare", file, "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_results(results)
    by_arm = {r.arm: r for r in found.runs.values()}
    assert len(results.read_text().splitlines()) == 3 and by_arm.keys() == {"dense", "faster"}
    # Equal tokens: the same batches, step by step, and the same loss before the first step.
    read = [
        [step["data_digest"] for step in read_metrics(tmp_path / "study" / arm / "seed_0")[0]]
        for arm in arms
    ]
    assert read[0] == read[1] and len(set(read[0])) == 8
    assert by_arm["dense"].data == by_arm["faster"].data == (read[0][0], read[0][-1])
    assert by_arm["dense"].first_loss == by_arm["faster"].first_loss
    assert by_arm["dense"].loss != by_arm["faster"].loss
    log = (tmp_path / "study" / "dense" / "seed_0" / "train.log").read_text()
    assert log.count("starting at step 0") == 1 and "resuming" not in log
    for arm, result in by_arm.items():
        assert not (tmp_path / "study" / arm / "seed_0" / "checkpoints").exists()
        windows = read_windows(found.windows(result.run))["valid"]
        assert windows.mean == pytest.approx(result.loss, rel=1e-6)
    assert "one seed" in done.stdout
    assert len(processes_about(str(tmp_path))) == 0


def test_trained_runs_without_a_result_are_all_collected(trained):
    """As a kill leaves them; the second one is wanted when the first one's result is there."""
    config, collected = load_run(trained), []
    run = StudyRun("dense", 0, (), config, Flops(1.0, 1.0), key_of(config), "dense/seed_0")
    watcher = Watcher(
        todo=lambda: [run] * (len(collected) < 2),
        done=lambda run, whole: collected.append(whole),
        failed=lambda run, why: pytest.fail(why),
        beat=lambda running: None,
    )
    with Signals() as signals:
        assert train_all(Places(1, ({},)), watcher, signals) == 0
    assert collected == [True, True]


def test_damaged_directories_and_a_full_disk_are_failures_of_their_runs(trained, tmp_path):
    """The others are collected."""
    whole = load_run(trained)
    empty, cut = tmp_path / "empty", tmp_path / "cut"
    empty.mkdir()
    (empty / "config.yaml").write_text("")
    shutil.copytree(trained, cut)
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(line for line in lines if "eval_loss" not in line))
    configs = {
        name: whole.model_copy(update={"run_dir": str(place)})
        for name, place in {"empty": empty, "cut": cut, "full": trained, "fine": trained}.items()
    }
    runs = [
        StudyRun(name, 0, (), config, Flops(1.0, 1.0), key_of(config), name)
        for name, config in configs.items()
    ]
    failed, collected = {}, []

    def done(run: StudyRun, whole: bool) -> None:
        if run.arm == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.jsonl")
        collected.append(collect(run, 1, diverged=not whole).arm)

    def todo() -> list[StudyRun]:
        return [run for run in runs if run.arm not in {*failed, *collected}]

    watcher = Watcher(todo, done, lambda run, why: failed.update({run.arm: why}), lambda _: None)
    with Signals() as signals:
        assert train_all(Places(1, ({},)), watcher, signals) == 0
    assert collected == ["fine"] and failed.keys() == {"empty", "cut", "full"}
    assert "must hold a mapping" in failed["empty"]
    assert "no evaluation after step" in failed["cut"]
    assert "No space left" in failed["full"]


def test_results_on_a_full_disk_have_no_half_line(write_study, monkeypatch):
    runs, _, results, _ = answered(write_study(), dense_loss)
    before = results.file.read_text()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(OSError, match="results.jsonl"):
        patched.setattr(os, "fsync", full)
        results.add(result_of(runs.run("layers", 0, ()), 1.0))
    assert results.file.read_text() == before


def test_time_left_is_that_of_runs_under_way_and_to_come(write_study, monkeypatch):
    """Of four runs of 8 steps, two beside each other, one is done, at .5 s a step, and another one
    half: 4 and 16 steps are left, and two starts."""
    file = write_study(arms={"dense": DENSE}, seeds=[0, 1, 2, 3], budgets=["tokens"])
    session = open_study(str(file), Wish(jobs=2))
    session.results.begin(session.header)
    runs = session.todo()
    session.running = [Running(run, None, i, None) for i, run in enumerate(runs[:2])]
    monkeypatch.setattr(queue, "steps_logged", lambda place: 4)
    session.results.add(result_of(runs[0], 3.0).model_copy(update={"step_s": 0.5}))
    left_s = (20 * 0.5 + 2 * START_S) / 2
    assert session._left() == f"; about 0:{left_s:.0f} left"


def test_runs_take_as_long_as_the_latest_one_of_their_arm(write_study):
    """Dense's first run had a busy machine, its second one .25 s a step; half of the layers take
    .75 s; the third arm has no run, and takes the middle of the two a FLOP."""
    arms = {"dense": DENSE, "half": {"method": HALF_LAYERS}, "new": DENSE}
    file = write_study(arms=arms, seeds=[0, 1, 2], budgets=["tokens"])
    runs = Runs(load_study(file))
    results = Results(file)
    for arm, seed, step_s in (("dense", 0, 8.0), ("half", 0, 0.75), ("dense", 1, 0.25)):
        found = result_of(runs.run(arm, seed, ()), 3.0)
        results.runs[found.run] = found.model_copy(update={"step_s": step_s})
    dense, half, new = (runs.run(arm, 2, ()) for arm in arms)
    dense_s, half_s = 8 * 0.25, 8 * 0.75
    new_s = new.flops.model * (dense_s / dense.flops.model + half_s / half.flops.model) / 2
    for run, seconds in ((dense, dense_s), (half, half_s), (new, new_s)):
        assert expected_s([run], results) == pytest.approx(seconds + START_S)
    left_s = expected_s([dense], results, begun=[(half, 0.25)])
    assert left_s == pytest.approx(dense_s + 0.25 * half_s + START_S)


@pytest.mark.slow
def test_a_notice_ends_measuring_at_once(write_study, tmp_path):
    file = write_study(arms={"dense": DENSE, "half": {"method": HALF_LAYERS}})
    command = [sys.executable, "-m", "est_ds.cli", "compare", str(file), "--time-only"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "study" / "times.log"
    wait_until(lambda: log.exists() and b"in turns" in log.read_bytes(), START_LIMIT_S)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=15)
    assert process.returncode == 75 and not processes_about(str(tmp_path))


@pytest.mark.slow
def test_a_notice_saves_the_runs_under_way_and_a_failed_run_does_not_end_the_others(
    write_study, tmp_path
):
    arms = {"dense": DENSE, "layers": {"method": LAYERS}}
    long = {"steps": 400, "parallel": {"pipe": 1, "processes": 1}, "checkpoint.every": 400}
    file = write_study(arms=arms, seeds=[0], intervals=False, budgets=["tokens"], set=long)
    study = tmp_path / "study"
    command = [sys.executable, "-m", "est_ds.cli", "compare", str(file), "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    metrics = study / "layers" / "seed_0" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, START_LIMIT_S)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "start it again to go on" in said
    saved = list((study / "layers" / "seed_0" / "checkpoints").glob("step_*"))
    assert len(saved) == 1 and not processes_about(str(tmp_path))
    # A run whose directory cannot be used fails by itself.
    (study / "dense" / "seed_0" / "config.yaml").write_text("steps: 3\n")
    done = est_ds("compare", file)
    assert done.returncode == 1 and "failed: dense/seed_0" in done.stdout
    assert {r.arm for r in read_results(study / "results.jsonl").runs.values()} == {"layers"}


@pytest.mark.slow
def test_step_times_are_measured_in_turns(write_study, tmp_path):
    file = write_study(arms={"dense": DENSE, "half": {"method": HALF_LAYERS}})
    done = est_ds("compare", file, "--time-only", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    times = read_results(tmp_path / "study" / "results.jsonl").times
    assert times.arms.keys() == {"dense", "half"} and times.arms["half"].ratio < 1.0
    assert not (tmp_path / "study" / "dense").exists()
    assert "half: 0." in done.stdout


def processes_about(text: str, limit_s: float = 20.0) -> list[str]:
    """Command lines that name a folder, once those that are ending have ended."""
    deadline = time.monotonic() + limit_s
    while True:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if text in line and int(process.name) != os.getpid():
                found.append(line)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def test_runs_of_one_process_may_share_gpus():
    def places(jobs, processes=1):
        found = on_gpus(["2", "5"], 16, processes, jobs)
        return [(place["CUDA_VISIBLE_DEVICES"], place["OMP_NUM_THREADS"]) for place in found]

    assert places(None) == [("2", "8"), ("5", "8")]
    assert places(1) == [("2", "16")]
    assert places(5) == [("2", "3"), ("5", "3"), ("2", "3"), ("5", "3"), ("2", "3")]
    assert places(None, processes=2) == [("2,5", "8")]
    for jobs, processes, expected in (
        (17, 1, "--jobs=17 with 1 processes a run"),
        (2, 2, "use at most --jobs=1"),
        (None, 3, "set parallel.processes to at most 2"),
    ):
        with pytest.raises(UserError, match=expected):
            places(jobs, processes)
