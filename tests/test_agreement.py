"""Ranks that would train different subnetworks end before they do."""

from __future__ import annotations

import time

import pytest

from est_ds.run.metrics import read_metrics
from layouts import LAYOUTS, METHODS
from workers import start


# ZeRO 3 and a pipeline would hang, ZeRO 1 would silently mix gradients of different layers.
@pytest.mark.parametrize(
    "layout",
    [
        *("data 2, ZeRO 3", "pipe 4, ZeRO 1"),
        pytest.param("data 2, ZeRO 1", marks=pytest.mark.slow),
    ],
)
def test_another_plan_on_one_rank_ends_all_with_ranks_and_digests(layout, synthetic_run, tmp_path):
    processes, arguments = LAYOUTS[layout]
    overrides = [f"run_dir={tmp_path}/run", *arguments, f"method={METHODS['est']}"]
    job = {"run": synthetic_run, "overrides": overrides, "odd_from": 6}
    began = time.monotonic()
    codes, logs = start(tmp_path / "log", processes, [job], timeout_s=120)
    assert time.monotonic() - began < 60
    assert codes == [1] * processes
    odd = processes - 1
    for log in logs:
        assert f"ranks [{odd}] disagree with rank 0 about the plan of step 6" in log
        assert f"rank {odd}: " in log
    # The comparison after step 5 covers the steps to the next one.
    assert [e["step"] for e in read_metrics(tmp_path / "run")[0]] == list(range(5))
