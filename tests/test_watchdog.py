"""The watchdog ends its process whatever becomes of what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from conftest import ROOT
from est_ds.launch.placement import free_port

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


def test_a_neighbour_that_stopped_before_it_said_anything_is_ended():
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", STOPS],
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = ranks[1].communicate(timeout=120)[1]
        assert ranks[1].returncode == 1
        assert "  rank 0 on " in said and "(it has told no step yet) does not answer" in said
        assert ranks[0].wait(5) == -signal.SIGKILL
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            rank.stderr.close()
