"""Which step times are those of an arm as it is now."""

from __future__ import annotations

from est_ds.studies.results import Times
from est_ds.studies.runs import Runs


def known_ratios(runs: Runs, times: Times | None) -> dict[str, float]:
    """Step times over the baseline's, of arms that have not changed since they were measured.

    An arm of the baseline's own config has 1: what was measured would be noise.
    """
    if times is None:
        return {}
    baseline = runs.timed_key(runs.file.baseline.name)
    if not _is_of(times, runs.file.baseline.name, baseline):
        return {}
    found = {}
    for arm in runs.file.arms:
        key = runs.timed_key(arm)
        if key == baseline:
            found[arm] = 1.0
        elif _is_of(times, arm, key):
            found[arm] = times.arms[arm].ratio
    return found


def _is_of(times: Times, arm: str, key: str) -> bool:
    return arm in times.arms and times.arms[arm].run == key
