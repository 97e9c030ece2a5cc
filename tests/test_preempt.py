"""A notice at any moment saves, ends with its own code, and costs the run nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import train
from namespaces import ranks_of, wait_until

from est_ds.checkpoints.store import LATEST, Store
from est_ds.metrics import read_metrics
from est_ds.preempt import EXIT_CODE


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """A run whose evaluations take as long as its steps, in several parts."""
    return [
        "evaluate={every: 2, sequences: 96}", "checkpoint.every=3", "checkpoint.keep_last=0",
        "parallel={pipe: 1, zero: 1, processes: 2}", "batch={global: 4, micro: 1}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tiny_run, settings, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = train(tiny_run, f"run_dir={run_dir}", *settings, processes=2)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.parametrize(
    "when",
    [
        pytest.param("training", marks=pytest.mark.slow),
        "evaluating",
        pytest.param("saving", marks=pytest.mark.slow),
    ],
)
def test_notice_saves_and_the_resumed_run_is_the_one_that_never_stopped(
    when, tiny_run, settings, uninterrupted, tmp_path
):
    run_dir = tmp_path / "run"
    command = [
        sys.executable, "-m", "est_ds.cli", "train", str(tiny_run), f"run_dir={run_dir}", *settings,
    ]  # fmt: skip
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(command, stdout=log, stderr=log) as started:

        def reached():
            steps, evaluations = (len(lines) for lines in read_metrics(run_dir))
            if when == "evaluating":  # a step is logged, and its evaluation is not
                return steps >= 4 and steps == 2 * (evaluations + 1)
            if when == "saving":
                return any(run_dir.glob("checkpoints/.step_*"))
            return steps >= 3

        wait_until(lambda: started.poll() is not None or reached(), 240, every_s=0.01)
        began = time.monotonic()
        if when == "training":
            started.send_signal(signal.SIGTERM)  # to est-ds, as a scheduler does
        else:
            os.kill(max(ranks_of(started.pid)), signal.SIGUSR1)  # not rank 0: it must be told
        assert started.wait(30) == EXIT_CODE, (tmp_path / "log").read_text()
        print(f"notice while {when}, to exit: {time.monotonic() - began:.1f} s")
    saved = Store(run_dir / "checkpoints").named(LATEST)
    assert saved == len(read_metrics(run_dir)[0]) < 20
    assert f"pre-empted: saved after step {saved}" in (tmp_path / "log").read_text()

    done = train(tiny_run, f"run_dir={run_dir}", *settings, processes=2)
    assert done.returncode == 0, done.stderr
    expected, found = read_metrics(uninterrupted), read_metrics(run_dir)
    for part, name in ((0, "loss"), (1, "eval_loss")):
        assert [(e["step"], e[name]) for e in found[part]] == [
            (e["step"], e[name]) for e in expected[part]
        ]
