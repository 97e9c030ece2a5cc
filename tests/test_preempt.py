"""A notice at any moment saves, ends with its own code, and costs the run nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from conftest import train, train_command
from est_ds.checkpoints.store import LATEST, Store
from est_ds.launch.placement import free_port
from est_ds.ranks.meeting import connect
from est_ds.ranks.preempt import EXIT_CODE
from est_ds.run.metrics import read_metrics
from namespaces import ranks_of, wait_until


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """A run whose evaluations take as long as its steps, in several parts."""
    return [
        "evaluate={every: 2, sequences: 96}",
        "checkpoint.every=3",
        "checkpoint.keep_last=0",
        "parallel={pipe: 1, zero: 1, processes: 2}",
        "batch={global: 4, micro: 1}",
    ]


@pytest.fixture(scope="module")
def uninterrupted(tiny_run, settings, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = train(tiny_run, f"run_dir={run_dir}", *settings, processes=2)
    assert done.returncode == 0, done.stderr
    return run_dir


class Ranks:
    """Ranks of a start in which the last one does not come, each started as a launcher does."""

    def __init__(self, folder: Path, size: int, *command: str) -> None:
        self.port = free_port()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        self.logs = [folder / f"log{rank}" for rank in range(size - 1)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, *command],
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    **place,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "OMP_NUM_THREADS": "1",
                },
            )
            for rank, log in enumerate(self.logs)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def have_met(self) -> bool:
        try:
            keys = [f"est_ds/met/{rank}" for rank in range(len(self.processes))]
            return connect("127.0.0.1", self.port).check(keys)
        except (OSError, dist.DistError):  # rank 0 is not there yet
            return any(process.poll() is not None for process in self.processes)

    def codes(self, limit_s: float) -> list[int]:
        return [process.wait(limit_s) for process in self.processes]

    @property
    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]


BEFORE_STEP_0 = "est-ds: pre-empted before the first step; start it again to go on.\n"
# Waits as in gloo's connections, where no handler of Python's runs.
IN_C = """
from datetime import timedelta
from est_ds.ranks import preempt
from est_ds.ranks.before_training import BeforeTraining
from est_ds.ranks.meeting import meet
from est_ds.ranks.world import World
preempt.heed_signals()
world = World.from_environment()
with BeforeTraining(world) as before:
    def wait(store):
        before.reached(store)
        store.set(f"est_ds/met/{world.rank}", "{}")
        store.set_timeout(timedelta(seconds=300))
        store.get("never")
    meet(world, 300, wait)
"""


def test_notice_while_ranks_wait_for_one_that_does_not_come_ends_all_at_once(tiny_run, tmp_path):
    """Two of three are there, and one of them is told."""
    run = [str(tiny_run), f"run_dir={tmp_path / 'run'}", "parallel.pipe=1", "batch.global=6"]
    with Ranks(tmp_path, 3, "-m", "est_ds.cli", "train", *run) as group:
        wait_until(group.have_met, 240)
        group.processes[1].send_signal(signal.SIGTERM)
        assert group.codes(60) == [EXIT_CODE] * 2, group.said
    assert group.said == [BEFORE_STEP_0, ""]
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def test_notice_is_heard_where_the_main_thread_never_comes_back(tmp_path):
    with Ranks(tmp_path, 3, "-c", IN_C) as group:
        wait_until(group.have_met, 240)
        group.processes[1].send_signal(signal.SIGUSR1)
        assert group.codes(60) == [EXIT_CODE] * 2, group.said
    assert group.said == [BEFORE_STEP_0, ""]


@pytest.mark.slow
@pytest.mark.parametrize("node_rank", [0, 1])
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, EXIT_CODE), (signal.SIGINT, 130)])
def test_signal_to_one_of_two_nodes_whose_other_is_not_there_ends_it(
    number, code, node_rank, tiny_run, tmp_path
):
    master = f"127.0.0.1:{free_port()}"
    command = [
        sys.executable,
        "-m",
        "est_ds.cli",
        "train",
        str(tiny_run),
        f"run_dir={tmp_path / 'run'}",
        "--nodes",
        "2",
        "--node-rank",
        str(node_rank),
        "--master",
        master,
        "--processes",
        "2",
    ]
    log = tmp_path / "log"
    with subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT) as started:
        wait_until(lambda: started.poll() is not None or len(ranks_of(started.pid)) == 2, 240)
        time.sleep(20)
        began = time.monotonic()
        started.send_signal(number)
        assert started.wait(60) == code, log.read_text()
        print(f"{number.name} to node {node_rank} alone, to exit: {time.monotonic() - began:.1f} s")


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
    command = train_command(tiny_run, run_dir, *settings)
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
