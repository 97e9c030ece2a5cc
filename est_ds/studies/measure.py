"""Step times of the arms of a study, measured in turns with the baseline's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median, quantiles
from typing import TextIO

import torch

from est_ds.cost.flops import dense_flops
from est_ds.errors import Failure, UserError
from est_ds.run.step_times import StepTimes
from est_ds.studies.results import ArmTimes, Times
from est_ds.studies.runs import Runs
from est_ds.training.time_runs import TimedRun, measure_runs

TRY_S = 4.0  # rounds of `try_steps`
MOST_FLOPS = {"cpu": 2e11, "cuda": 1e14}  # of a step that is tried


def measure(runs: Runs, processes: int, log: TextIO | None = None) -> Times:
    """Measures every phase of every arm in turns with the full model of the baseline.

    Args:
        processes: of a run.
        log: takes what the processes say.

    Raises:
        Failure: they could not be measured.
    """
    file, baseline = runs.file, runs.file.baseline.name
    others = [name for name in file.arms if name != baseline]
    # The baseline too, which need not be the full model in all phases.
    timed = [_timed(runs, baseline, "full model"), *(_timed(runs, a) for a in (baseline, *others))]
    found = measure_runs(timed, processes, log=log)
    unit = median(found[baseline].run_ratios(baseline))
    times = next(iter(found.values()))
    return Times(
        device=times.layout["device"],
        processes=processes,
        arms={name: _arm_times(runs, found, name, unit) for name in found},
        busy=max(t.others for t in found.values()),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def try_steps(runs: Runs, processes: int) -> float | None:
    """A few full steps of the baseline on this machine, for who asks how long a study takes.

    Args:
        processes: of a run.

    Returns:
        Seconds per model FLOP; None where a step is too long to be tried, or cannot be taken, as
        without the corpora.
    """
    name = runs.file.baseline.name
    design = runs.design(name, runs.file.baseline.grid[0])
    size = design.flops_size(design.config.batch.global_)
    flops = dense_flops(design.method.shape, **size).model
    if flops > MOST_FLOPS["cuda" if torch.cuda.is_available() else "cpu"]:
        return None
    try:
        with open(os.devnull, "w") as log:
            [times] = measure_runs([_timed(runs, name)], processes, TRY_S, log).values()
    except (UserError, Failure):
        return None
    return median(times.baseline.step_s) / flops


def _timed(runs: Runs, arm: str, name: str | None = None) -> TimedRun:
    values = runs.file.arms[arm].grid[0]
    return TimedRun(name or arm, str(runs.file.base), tuple(runs.overrides(arm, values)))


def _arm_times(runs: Runs, found: Mapping[str, StepTimes], arm: str, unit: float) -> ArmTimes:
    """Step times of an arm.

    Args:
        unit: wall-clock ratio of the baseline's mean step to its full one.
    """
    times, baseline = found[arm], runs.file.baseline.name
    ratios = times.run_ratios(arm)
    middle = median(ratios)
    on_gpu = times.baseline.device_s is not None
    return ArmTimes(
        run=runs.timed_key(arm),
        ratio=middle / unit,
        cpu_ratio=None if on_gpu else _cpu(times, arm) / _cpu(found[baseline], baseline),
        step_s=middle * median(times.baseline.step_s),
        spread=_spread(ratios),
    )


def _cpu(times: StepTimes, arm: str) -> float:
    return median(times.run_ratios(arm, "cpu_s"))


def _spread(ratios: Sequence[float]) -> float | None:
    if len(ratios) < 3:
        return None
    low, _, high = quantiles(ratios, n=4)
    return (high - low) / 2 / median(ratios)
