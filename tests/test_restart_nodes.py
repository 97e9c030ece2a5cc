"""A run on several hosts is started again on those that are left, and never outlives est-ds.

The hosts are namespaces on this machine; `est-ds` runs on a third one, which trains nothing.
"""

from __future__ import annotations

import signal
import time

import pytest

from conftest import ROOT, train
from est_ds.run.metrics import read_metrics
from namespaces import Cluster, signal_all, wait_until, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no hosts: {REASON}")
TRY = "est-ds: exit code 1; try "
# A checkpoint every second or so, and time enough for a fault before the run is done.
STEPS = 60
LONGER = [
    f"steps={STEPS}", "method.name=full", "checkpoint.every=5", "evaluate.every=20",
    "watchdog.limit_s=40",
]  # fmt: skip


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path, size=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def uninterrupted(tiny_run, tmp_path_factory):
    """In one process on this machine."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    alone = "parallel={pipe: 1, zero: 1, processes: 1}"
    done = train(tiny_run, f"run_dir={run_dir}", *LONGER, alone, processes=1)
    assert done.returncode == 0, done.stderr
    return read_metrics(run_dir)


def assert_same_losses(run_dir, expected) -> None:
    """Those of every step and evaluation, in whatever layouts they were computed."""
    found = read_metrics(run_dir)
    for part, name in ((0, "loss"), (1, "eval_loss")):
        assert [e["step"] for e in found[part]] == [e["step"] for e in expected[part]]
        for mine, theirs in zip(found[part], expected[part]):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5)


def wait_for_steps(job, steps: int, started) -> None:
    wait_until(lambda: started.process.poll() is not None or job.steps() >= steps, 240)
    assert started.process.poll() is None, started.text


def start(job, *more: str, slots: int = 2, steps: int = 12):
    """From the third host, until it has trained some steps."""
    hostfile = str(job.cluster.hostfile(slots, "node0", "node1"))
    started = job.cluster.est_ds(*job.arguments, *LONGER, "--hostfile", hostfile, *more, host=2)
    wait_for_steps(job, steps, started)
    return started


@pytest.mark.slow
@pytest.mark.parametrize("dies, left", [(1, 0), (0, 1)])
def test_run_goes_on_without_a_host_that_died_and_trains_the_same(dies, left, job, uninterrupted):
    started = start(job, "--restarts", "3")
    began = time.monotonic()
    job.cluster.hosts[dies].stop()
    at = job.steps()
    wait_until(lambda: "1 replicas" in started.text, 240)
    wait_until(lambda: job.steps() > at or started.process.poll() is not None, 240)
    print(f"host {dies} dies, to a new step on the other: {time.monotonic() - began:.1f} s")
    assert started.wait(240) == 0, started.text
    said = f"no answer from node{dies}; starting 2 processes (2 on node{left})"
    assert said in started.text
    assert started.text.count(TRY) == 1
    assert "micro_batch 2 x accumulation 4 x data_parallel 1" in started.text
    assert_same_losses(job.run_dir, uninterrupted)


@pytest.mark.slow
def test_host_that_is_back_is_used_again(job, uninterrupted):
    started = start(job, "--restarts", "3", "watchdog.limit_s=20")
    lost = job.cluster.hosts[1]
    lost.ip("link", "set", "eth0", "down")
    wait_until(lambda: "1 replicas" in started.text, 240)
    lost.ip("link", "set", "eth0", "up")
    before = job.steps()
    wait_until(lambda: job.steps() > before + 6, 240)
    signal_all(job.cluster.hosts[0].ranks()[:1], signal.SIGKILL)
    assert started.wait(240) == 0, started.text
    assert started.text.count("= 2 pipe stages x 2 replicas") == 2
    assert started.text.count(TRY + "1 of 3") == started.text.count(TRY) == 2
    assert_same_losses(job.run_dir, uninterrupted)


@pytest.mark.slow
def test_too_few_hosts_are_tries_and_named(job):
    """Of a pipeline of two stages one process is left."""
    file = job.cluster.folder / "uneven"
    file.write_text("node0 slots=1\nnode1 slots=3\n")
    started = job.cluster.est_ds(
        *job.arguments,
        *LONGER,
        "watchdog.limit_s=100",
        "--hostfile",
        str(file),
        "--restarts",
        "2",
        host=2,
    )
    wait_for_steps(job, 7, started)
    job.cluster.hosts[1].stop()
    assert started.wait(240) == 1, started.text
    assert started.text.count("no answer from node1; the others have 1 processes") == 2
    assert started.text.count(TRY) == 2


@pytest.mark.slow
def test_nodes_that_are_each_started_by_themselves_all_start_again(job, uninterrupted):
    nodes = [
        job.cluster.start(
            str(ROOT / "launch" / "node.sh"),
            *job.arguments[1:],
            *LONGER,
            "--processes",
            "2",
            "--restarts",
            "2",
            host=rank,
            NODE_RANK=str(rank),
            NNODES="2",
            MASTER_ADDR="node0",
        )
        for rank in (0, 1)
    ]
    wait_for_steps(job, 12, nodes[0])
    signal_all(job.cluster.hosts[1].ranks()[:1], signal.SIGKILL)
    assert [node.wait(240) for node in nodes] == [0, 0], [node.text for node in nodes]
    assert [node.text.count(TRY) for node in nodes] == [1, 1]
    assert_same_losses(job.run_dir, uninterrupted)


def test_nothing_outlives_a_killed_est_ds(job):
    started = start(job, "steps=5000", slots=1, steps=3)
    assert job.left()
    began = time.monotonic()
    started.notify(signal.SIGKILL)
    wait_until(lambda: not job.left(), 8)
    print(f"SIGKILL of est-ds to the end of all: {time.monotonic() - began:.1f} s")
    wait_until(
        lambda: not job.cluster.hosts[2].find("est_ds.launch.orphans|pdsh|launcher.runner"), 20
    )
