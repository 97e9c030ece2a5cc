"""Differences by held-out window: what the choice of held-out text leaves open.

The interval over seeds holds the text fixed, since all runs are evaluated on the same windows. This
one holds the runs fixed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from est_ds.errors import UserError
from est_ds.run.windows import WindowLosses, read_windows
from est_ds.studies.results import Results, RunResult
from est_ds.studies.statistics import Difference, Interval, bootstrap_interval

Corpora = dict[str, WindowLosses]


@dataclass(frozen=True)
class OverWindows:
    """An arm's difference from the baseline, over the choice of held-out windows.

    Attributes:
        interval: of the mean difference of `seeds`; its mean is that of their stored losses.
        seeds: those whose two runs have their losses by window.
        count: of windows.
    """

    interval: Interval
    seeds: tuple[int, ...]
    count: int

    def could_turn(self, difference: Difference | None) -> bool:
        """Whether other text could turn the sign, and leaves no less open than the seeds do."""
        low, high = self.interval.low, self.interval.high
        if difference is None or low is None or high is None or not low < 0.0 < high:
            return False
        over_seeds = difference.interval
        if over_seeds.low is None or over_seeds.high is None:
            return True
        return high - low >= over_seeds.high - over_seeds.low


@dataclass
class ByWindow:
    """Held-out losses by window of the runs of a study, read when they are asked for."""

    results: Results
    _read: dict[str, Corpora | None] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """How many of the runs that were asked for have no file."""
        return sum(found is None for found in self._read.values())

    @property
    def asked(self) -> int:
        return len(self._read)

    def compare(
        self, arm: Mapping[int, RunResult], baseline: Mapping[int, RunResult]
    ) -> OverWindows | None:
        """The difference of the seeds that both have; None where no seed has both files.

        Raises:
            UserError: a file cannot be read.
        """
        by_seed = {}
        for seed in sorted(arm.keys() & baseline.keys()):
            here, there = self._of(arm[seed]), self._of(baseline[seed])
            if here and there and _alike(here, there):
                by_seed[seed] = _influences(here, there)
        if not by_seed:
            return None
        values = np.mean(list(by_seed.values()), axis=0)
        return OverWindows(bootstrap_interval(values), tuple(by_seed), len(values))

    def _of(self, run: RunResult) -> Corpora | None:
        """Of a run that did not diverge; None without a file."""
        if run.loss is None:
            return None
        if run.run not in self._read:
            self._read[run.run] = self._load(run.run)
        return self._read[run.run]

    def _load(self, key: str) -> Corpora | None:
        file = self.results.windows(key)
        try:
            return read_windows(file) or None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
            raise UserError(
                f"{file}: no losses by window can be read from it ({' '.join(str(e).split())}); "
                f"restore the file, or remove it: its run is then compared without them."
            ) from None


def _alike(here: Corpora, there: Corpora) -> bool:
    """Whether both are of the same text."""
    return here.keys() == there.keys() and all(
        np.array_equal(here[name].windows, there[name].windows)
        and np.array_equal(here[name].targets, there[name].targets)
        for name in here
    )


def _influences(here: Corpora, there: Corpora) -> np.ndarray:
    """A value of every window, whose mean is the difference of the held-out losses.

    That is the mean over corpora, each the mean over its targets. A window's value is that mean
    and, in proportion to its targets, what the window is off the mean of its corpus: so corpora are
    not resampled against each other, nor are windows counted that have no target. Of one corpus
    with windows of equal length it is the difference of the window.
    """
    count = sum(len(held.losses) for held in here.values())
    means, off = [], []
    for name, held in here.items():
        differences = held.losses - there[name].losses
        weights = held.targets / max(1, held.targets.sum())
        means.append(float((weights * differences).sum()))
        off.append(count / len(here) * weights * (differences - means[-1]))
    return np.mean(means) + np.concatenate(off)
