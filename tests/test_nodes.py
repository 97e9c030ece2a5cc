"""Training on several hosts, which are namespaces on this machine, and what ends it.

`-m slow` has the other ways to start, and processes that are stopped. With `-s` the tests print how
long it took until nothing of the run was left.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT, train
from est_ds.checkpoints.store import LATEST, Store
from est_ds.ranks.watchdog import EVERY_S
from est_ds.run.metrics import read_metrics
from namespaces import LIMIT_S, Cluster, signal_all, wait_until, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no hosts: {REASON}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("hosts")) as cluster:
        yield cluster


def assert_failed(started, job, within_s: float, what: str, *said: str) -> None:
    """The command ends with 1, in time, and leaves no process on any host.

    Args:
        what: happened just now.
    """
    began = time.monotonic()
    assert started.wait(within_s) == 1, started.text
    wait_until(lambda: not job.left(), 10)
    print(f"{what}, to the end of all: {time.monotonic() - began:.1f} s")
    for text in said:
        assert text in started.text
    assert "Traceback" not in started.text


@pytest.fixture(scope="module")
def here(tiny_run, tmp_path_factory) -> Callable[[int], Path]:
    """Trains the run on this machine in some processes; returns its directory."""
    folder = tmp_path_factory.mktemp("here")

    def trained(processes: int) -> Path:
        done = train(tiny_run, f"run_dir={folder}/{processes}", processes=processes)
        assert done.returncode == 0, done.stderr
        return folder / str(processes)

    return trained


@pytest.mark.parametrize("slots", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_over_ssh_is_pre_empted_resumed_and_equals_the_run_on_one_machine(slots, job, here):
    hostfile = str(job.cluster.hostfile(slots))
    command = [*job.arguments, "--hostfile", hostfile]
    first = job.cluster.est_ds(*command)
    job.wait_for_steps(3, first)
    began = time.monotonic()
    first.notify(signal.SIGTERM)
    assert first.wait(60) == 75, first.text
    print(f"SIGTERM to exit: {time.monotonic() - began:.1f} s")
    assert not job.left()
    assert "pre-empted: saved after step" in first.text
    saved = Store(job.run_dir / "checkpoints").named(LATEST)
    assert 3 <= saved < 20

    second = job.cluster.est_ds(*command)
    assert second.wait(90) == 0, second.text
    assert f"resuming at step {saved}" in second.text

    expected, found = read_metrics(here(2 * slots)), read_metrics(job.run_dir)
    for part in (0, 1):
        name = ("loss", "eval_loss")[part]
        assert [e[name] for e in found[part]] == [e[name] for e in expected[part]]


@pytest.mark.slow
def test_killed_process_ends_all_and_is_named(job):
    started = job.begin(slots=1)
    time.sleep(2 * EVERY_S)  # then the others know of a step of it
    signal_all(job.cluster.hosts[1].ranks(), signal.SIGKILL)
    said = ("rank 1 on node1 (last step ", "1 other waited for it")
    assert_failed(started, job, 30, "a process killed", *said)


@pytest.mark.slow
def test_killed_rank_0_ends_all(job):
    started = job.begin()
    signal_all(job.cluster.hosts[0].ranks()[:1], signal.SIGKILL)
    assert_failed(started, job, 30, "rank 0 killed", "rank 0 on node0")


@pytest.mark.slow
@pytest.mark.parametrize("host, named", [(0, "rank 0 on node0"), (1, "rank 2 on node1")])
def test_stopped_process_ends_all_within_the_limit_and_is_named(host, named, job):
    started = job.begin()
    signal_all(job.cluster.hosts[host].ranks()[:1], signal.SIGSTOP)
    said = (f"no progress for {LIMIT_S} s", named)
    assert_failed(started, job, LIMIT_S + 20, f"{named} stopped", *said)


@pytest.mark.slow
def test_host_whose_processes_all_hang_is_ended(job):
    started = job.begin()
    signal_all(job.cluster.hosts[1].ranks(), signal.SIGSTOP)
    said = ("rank 2 on node1", "rank 3 on node1")
    assert_failed(started, job, 3 * LIMIT_S + 15, "all processes of a host stopped", *said)


@pytest.mark.slow
def test_process_that_fails_says_why_on_all_hosts(job):
    started = job.begin()
    # Its own code fails, as a bug or a full disk would: rank 0 cannot write its metrics.
    [rank_0, *_] = job.cluster.hosts[0].ranks()
    [metrics] = [
        fd
        for fd in Path(f"/proc/{rank_0}/fd").iterdir()
        if os.path.realpath(fd).endswith("metrics.jsonl")
    ]
    subprocess.run(["prlimit", "--pid", str(rank_0), f"--fsize={metrics.stat().st_size}"])
    assert started.wait(40) == 1, started.text
    wait_until(lambda: not job.left(), 10)
    assert "rank 0 on node0" in started.text and "failed: OSError" in started.text


@pytest.mark.slow
def test_notice_to_one_process_of_one_host_stops_all_at_one_step(job):
    started = job.begin()
    began = time.monotonic()
    signal_all(job.cluster.hosts[1].ranks()[1:], signal.SIGUSR1)
    assert started.wait(30) == 75, started.text
    print(f"SIGUSR1 to one process, to exit: {time.monotonic() - began:.1f} s")
    assert not job.left()
    assert Store(job.run_dir / "checkpoints").named(LATEST) == job.steps()


@pytest.mark.slow
def test_link_that_is_down_for_10_s_only_costs_that_time(job):
    started = job.begin("watchdog.limit_s=30", slots=1)
    link = job.cluster.hosts[1]
    link.ip("link", "set", "eth0", "down")
    time.sleep(10)
    link.ip("link", "set", "eth0", "up")
    job.wait_for_steps(job.steps() + 20, started)
    started.notify(signal.SIGTERM)
    assert started.wait(30) == 75, started.text


@pytest.mark.slow
def test_link_that_is_gone_ends_all_within_the_limit(job):
    started = job.begin()
    link = job.cluster.hosts[1]
    link.ip("link", "set", "eth0", "down")
    try:
        assert_failed(started, job, 4 * LIMIT_S, "a link gone", "rank 2 on node1")
    finally:
        link.ip("link", "set", "eth0", "up")


@pytest.mark.slow
def test_slow_link_trains_the_same(job, here):
    slow = job.cluster.hosts[1]
    shape = ("dev", "eth0", "root", "tbf", "rate", "20mbit", "burst", "32kb", "latency", "50ms")
    slow.tc("add", *shape)
    try:
        hostfile = str(job.cluster.hostfile())
        started = job.cluster.est_ds(*job.arguments, "--hostfile", hostfile, "steps=20")
        assert started.wait(120) == 0, started.text
    finally:
        slow.tc("del", "dev", "eth0", "root")
    expected, found = (read_metrics(run_dir)[0] for run_dir in (here(4), job.run_dir))
    assert [e["loss"] for e in found] == [e["loss"] for e in expected]


def test_host_that_cannot_be_reached_ends_the_start_and_is_named(job):
    hostfile = job.cluster.hostfile(1, "node0", "node7")
    started = job.cluster.est_ds(*job.arguments, "--hostfile", str(hostfile))
    assert_failed(started, job, 2 * LIMIT_S + 30, "a host that is not there", "node7")


@pytest.mark.slow
def test_host_of_another_version_is_refused_by_its_name(job):
    other = job.cluster.folder / "other.py"
    other.write_text('"""Another version."""\n\n__version__ = "99.0"\n')
    target = ROOT / "est_ds" / "__init__.py"
    [host] = job.cluster.hosts[1:]
    for arguments in (("mount", "--bind", str(other), str(target)), ("umount", str(target))):
        subprocess.run(host.command(*arguments, cwd=Path("/")), check=True)
        if arguments[0] == "umount":
            break
        hostfile = str(job.cluster.hostfile(1))
        started = job.cluster.est_ds(*job.arguments, "--hostfile", hostfile)
        assert started.wait(120) == 2, started.text
        assert "99.0 on node1" in started.text


@pytest.mark.slow
def test_node_script_on_every_host_trains_without_ssh_and_heeds_a_notice(job):
    arguments = [*job.endless[1:], "--processes", "2"]

    def start(rank: int):
        return job.cluster.start(
            str(ROOT / "launch" / "node.sh"),
            *arguments,
            host=rank,
            NODE_RANK=str(rank),
            NNODES="2",
            MASTER_ADDR="node0",
        )

    nodes = [start(0), start(1)]
    job.wait_for_steps(5, nodes[0])
    nodes[1].notify(signal.SIGTERM)  # as when one machine is taken away
    assert [node.wait(30) for node in nodes] == [75, 75], [node.text for node in nodes]
    assert not job.left()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mpirun"), reason="needs mpirun (Debian: openmpi-bin)")
def test_openmpi_script_trains_on_all_hosts_and_passes_a_notice_on(job):
    started = job.cluster.start(
        str(ROOT / "launch" / "openmpi.sh"),
        str(job.cluster.hostfile()),
        *job.endless[1:],
        OMPI_ALLOW_RUN_AS_ROOT="1",
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
    )
    job.wait_for_steps(5, started)
    started.notify(signal.SIGTERM)
    assert started.wait(30) == 75, started.text
    wait_until(lambda: not job.left(), 10)


@pytest.mark.slow
def test_doctor_measures_between_hosts_and_names_the_one_that_is_not_there(job):
    run = [*job.arguments[1:]]
    well = job.cluster.est_ds("doctor", *run, "--hostfile", str(job.cluster.hostfile()))
    assert well.wait(120) == 0, well.text
    assert "GB/s" in well.text and "eth0 (10.77.0.11)" in well.text

    hostfile = str(job.cluster.hostfile(2, "node0", "node1", "node7"))
    missing = job.cluster.est_ds("doctor", *run, "--hostfile", hostfile)
    assert missing.wait(120) == 2, missing.text
    assert "node7   FAILS" in missing.text and "GB/s" in missing.text

    nodes = [
        job.cluster.est_ds(
            "doctor", *run, "--nodes", "2", "--node-rank", str(rank), "--master", "node0", host=rank
        )
        for rank in (0, 1)
    ]
    assert [node.wait(120) for node in nodes] == [0, 0], [node.text for node in nodes]


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["node7", "10.77.0.99"], ids=["unknown", "unreachable"])
@pytest.mark.parametrize("delay_s", [0, 25])  # the ranks have just started; they wait
def test_notice_while_hosts_wait_for_one_that_is_not_there_ends_all_with_75(delay_s, missing, job):
    hostfile = str(job.cluster.hostfile(2, "node0", missing))
    where = ("watchdog.limit_s=300", "--hostfile", hostfile, "--master", "node0")
    started, first = job.cluster.est_ds(*job.arguments, *where), job.cluster.hosts[0]
    wait_until(lambda: started.process.poll() is not None or first.ranks(), 240)
    time.sleep(delay_s)
    began = time.monotonic()
    started.notify(signal.SIGTERM)
    assert started.wait(90) == 75, started.text
    print(f"SIGTERM while a host is not there, to exit: {time.monotonic() - began:.1f} s")
    assert not job.left()
    assert "pre-empted before the first step" in started.text
    assert not (job.run_dir / "config.yaml").exists()
