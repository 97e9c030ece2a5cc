"""A failed run is started again by itself, and only a failed one."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import est_ds, train, train_command
from est_ds.config.run_file import load_run
from est_ds.config.sections import Batch
from est_ds.launch import retries
from est_ds.launch.placement import Launch, free_port, where_to
from est_ds.launch.retries import fit, train_again_until_done
from est_ds.ranks.preempt import EXIT_CODE
from est_ds.run.metrics import read_metrics
from namespaces import ranks_of, wait_until

SMALL = ["parallel={pipe: 1, zero: 1}", "batch={global: 4, micro: 1}"]
ALONE = ["parallel={pipe: 1, zero: 1, processes: 1}"]
TRY = "est-ds: exit code 1; try "
# Less than a checkpoint of the tiny model: every start fails when it saves.
TOO_SMALL_FILE_BYTES = 100_000


def command(tiny_run, run_dir, *more):
    return train_command(tiny_run, run_dir, *ALONE, *more)


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (TOO_SMALL_FILE_BYTES, TOO_SMALL_FILE_BYTES))


# The layout on the hosts that are left


@given(
    slots=st.lists(st.integers(1, 9), min_size=0, max_size=6),
    micro=st.integers(1, 4),
    replicas=st.integers(1, 12),
    more=st.integers(1, 6),
    pipe=st.integers(1, 8),
)
def test_layout_on_what_is_left_is_the_largest_that_keeps_the_global_batch(
    slots, micro, replicas, more, pipe
):
    hosts = {f"node{i}": n for i, n in enumerate(slots)}
    batch = Batch(global_=micro * replicas * more, micro=micro)
    chosen = fit(hosts, batch, pipe)
    if chosen is None:
        assert sum(slots) < pipe
        return
    processes = sum(chosen.values())
    assert processes % pipe == 0
    batch.accumulation(processes // pipe)  # raises if it does not divide
    for larger in range(processes + pipe, sum(slots) + 1, pipe):
        assert batch.global_ % (batch.micro * (larger // pipe))
    used = list(chosen)
    assert used == list(hosts)[: len(used)]
    assert all(chosen[host] == hosts[host] for host in used[:-1])
    assert 1 <= chosen[used[-1]] <= hosts[used[-1]]


def test_layout_on_all_hosts_is_the_one_of_the_hostfile():
    slots = {"a": 8, "b": 8, "c": 8}
    assert fit(slots, Batch(global_=48, micro=2), 4) == slots
    del slots["b"]
    assert fit(slots, Batch(global_=48, micro=2), 4) == slots
    assert fit({"a": 8, "c": 3}, Batch(global_=48, micro=2), 1) == {"a": 8}
    assert fit({"a": 3, "c": 3}, Batch(global_=48, micro=2), 5) == {"a": 3, "c": 2}


def test_another_start_has_another_name_and_the_first_host_left_is_the_master():
    there = Launch({"10.0.0.1": 2, "10.0.0.2": 2}, ("10.0.0.1", 29501), by_ssh=True)
    assert there.again(there.slots).master == there.master
    fewer = there.again({"10.0.0.2": 2})
    assert fewer.master == ("10.0.0.2", 29501)
    assert len({there.name, fewer.name, there.again(there.slots).name}) == 3


# What is started again, and how often


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_whose_processes_are_killed_now_and_then_is_completed(
    processes, tiny_run, tmp_path, monkeypatch, capfd
):
    """Two kills with one restart allowed: a new checkpoint in between resets the count."""
    done = train(tiny_run, f"run_dir={tmp_path / 'whole'}", *SMALL, processes=processes)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.5)
    overrides = [f"run_dir={tmp_path / 'killed'}", *SMALL]
    config = load_run(tiny_run, overrides)
    given = dict(hostfile=None, nodes=None, node_rank=None, master=None, processes=processes)

    def kill_two():
        for step in (6, 12):  # after the checkpoints 5 and 10
            wait_until(lambda: len(read_metrics(tmp_path / "killed")[0]) >= step, 240, every_s=0.01)
            os.kill(max(ranks_of(os.getpid())), signal.SIGKILL)

    killing = threading.Thread(target=kill_two)
    killing.start()
    where = where_to(config, Namespace(**given))
    arguments = ["train", str(tiny_run), *overrides]
    code = train_again_until_done(arguments, where, config, restarts=1)
    killing.join()
    said = capfd.readouterr().err
    assert code == 0, said
    assert said.count(TRY + "1 of 1") == said.count(TRY) == 2, said
    expected, found = (read_metrics(tmp_path / name) for name in ("whole", "killed"))
    for part, name in ((0, "loss"), (1, "eval_loss")):
        assert [(e["step"], e[name]) for e in found[part]] == [
            (e["step"], e[name]) for e in expected[part]
        ]


@pytest.mark.slow
def test_run_that_always_fails_ends_after_its_tries(tiny_run, tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        command(tiny_run, tmp_path / "run", "--restarts", "1"),
        preexec_fn=limit_files,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count(TRY) == 1
    assert "could not write the checkpoint" in done.stderr
    assert "not started again" in done.stderr
    assert time.monotonic() - began > retries.FIRST_WAIT_S


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, EXIT_CODE), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_signal_while_it_waits_ends_it_without_another_start(number, code, tiny_run, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as out:
        started = subprocess.Popen(
            command(tiny_run, tmp_path / "run", "--restarts", "2"),
            preexec_fn=limit_files,
            stdout=out,
            stderr=out,
        )
    wait_until(lambda: started.poll() is not None or TRY in log.read_text(), 240)
    started.send_signal(number)
    assert started.wait(30) == code, log.read_text()
    assert log.read_text().count("starting at step 0") == 1
    assert "because of a signal" in log.read_text()


@pytest.mark.parametrize(
    "code, starts",
    [(1, 2), (EXIT_CODE, 1), *(pytest.param(n, 1, marks=pytest.mark.slow) for n in (2, 3))],
)
def test_only_exit_code_1_of_the_processes_is_started_again(
    code, starts, tiny_run, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.1)
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif 'RANK' in os.environ:\n    print('a start', flush=True)\n"
        f"    os._exit({code})\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    config = load_run(tiny_run, [f"run_dir={tmp_path}/run"])
    where = Launch({"localhost": 1}, ("127.0.0.1", 29500))
    assert train_again_until_done(["train"], where, config, restarts=1) == code
    assert capfd.readouterr().out.count("a start") == starts


def test_wrong_input_is_not_started_again(tiny_run, tmp_path, corpus):
    """Found by the processes: the bytes of the corpus are compared there."""
    for file in corpus.glob("train.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = tmp_path / "train.bin"
    data.write_bytes(bytes(10) + data.read_bytes()[10:])
    done = est_ds(
        "train",
        tiny_run,
        f"run_dir={tmp_path / 'run'}",
        f"data.train={tmp_path / 'train'}",
        "data.verify=hashes",
        *ALONE,
        "--restarts",
        "3",
    )
    assert done.returncode == 2, done.stderr
    assert TRY not in done.stderr


def test_restarts_inside_a_launcher_are_refused(tiny_run, tmp_path):
    run_dir = f"run_dir={tmp_path / 'run'}"
    done = est_ds("train", tiny_run, run_dir, "--restarts", "3", RANK="0", WORLD_SIZE="1")
    assert done.returncode == 2 and "--restarts=3 inside a launcher" in done.stderr


OLD_AND_NEW = """
import sys, time
from est_ds.ranks.world import World
from est_ds.ranks.meeting import meet
from est_ds.ranks.watchdog import Watchdog
world = World.from_environment()
with Watchdog(meet(world, 100), world, 100) as watchdog:
    print("met", flush=True)
    while True:
        watchdog.mark(0, "training")
        time.sleep(0.5)
"""


def test_process_left_of_an_earlier_start_ends_and_does_not_touch_the_new_one(tmp_path):
    """Rank 0 died, and the new one listens on the same port before the others have noticed."""
    port = free_port()
    logs: list[Path] = []

    def process(rank: int) -> subprocess.Popen:
        logs.append(tmp_path / f"log-{len(logs)}")
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        with logs[-1].open("w") as out:
            return subprocess.Popen(
                [sys.executable, "-c", OLD_AND_NEW],
                stdout=out,
                stderr=out,
                env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )

    old = [process(0), process(1)]
    new: list[subprocess.Popen] = []
    try:
        wait_until(lambda: all("met" in log.read_text() for log in logs), 90)
        old[1].send_signal(signal.SIGSTOP)
        old[0].kill()
        old[0].wait()
        new += [process(0), process(1)]
        wait_until(lambda: all("met" in log.read_text() for log in logs), 90)
        old[1].send_signal(signal.SIGCONT)
        assert old[1].wait(40) == 1
        assert "the run was started again" in logs[1].read_text()
        time.sleep(3)  # longer than the new ones need to hear an alarm
        assert [each.poll() for each in new] == [None, None], logs[2].read_text()
    finally:
        for each in old + new:
            each.kill()
            each.wait()
