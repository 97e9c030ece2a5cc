"""What ends a process that hangs, or that waits for one that does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import pytest

from workers import ROOT, launched

STOPS = """
import os, signal
from est_ds.ranks.meeting import meet
from est_ds.ranks.watchdog import Watchdog
from est_ds.ranks.world import World
world = World.from_environment()
meeting = meet(world, 60)
if world.is_first:
    meeting.store.wait(["met"])
    os.kill(os.getpid(), signal.SIGSTOP)
meeting.store.set("met", "")
with Watchdog(meeting, world, 1.0):
    signal.pause()
"""
WAITS = """
from est_ds.ranks.meeting import meet
from est_ds.ranks.world import World
meet(World.from_environment(), 5.0, lambda store: print("reached", flush=True))
"""
HANGS = """
import time
from est_ds.ranks.meeting import meet
from est_ds.ranks.watchdog import Watchdog
from est_ds.ranks.world import World
world = World.from_environment()
with Watchdog(meet(world, 60), world, 1.0):
    time.sleep(300)
"""


def test_a_process_that_hangs_ends_though_nobody_reads_its_errors():
    source, sink = os.pipe()
    os.close(source)
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    started = subprocess.Popen(
        [sys.executable, "-c", HANGS], cwd=ROOT, env={**os.environ, **place}, stderr=sink
    )
    os.close(sink)
    assert started.wait(120) == 1


@contextmanager
def started(script: str, size: int, ranks: int) -> Iterator[list[subprocess.Popen]]:
    """Runs the script in the first ranks of `size`, as children of this process."""
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in islice(launched(size), ranks)
    ]
    try:
        yield begun
    finally:
        for process in begun:
            process.kill()
            process.communicate()


def test_a_neighbour_that_stopped_before_it_said_anything_is_ended():
    with started(STOPS, size=2, ranks=2) as (stops, goes_on):
        said = goes_on.communicate(timeout=120)[1]
        assert goes_on.returncode == 1
        assert "  rank 0 on " in said and "(it has told no step yet) does not answer" in said
        assert stops.wait(5) == -signal.SIGKILL


@pytest.mark.slow
def test_a_process_ends_if_rank_0_stops_before_all_have_come():
    with started(WAITS, size=3, ranks=2) as (first, other):
        assert other.stdout.readline() == "reached\n"
        first.send_signal(signal.SIGSTOP)
        said = other.communicate(timeout=60)[1]
        assert "Failure: rank 0 at 127.0.0.1:" in said and " no longer answers" in said
