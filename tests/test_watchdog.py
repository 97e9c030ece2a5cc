"""The watchdog ends its process whatever becomes of what it says."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT

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
