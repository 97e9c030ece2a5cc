"""What the page of a study draws: runs of every arm, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from est_ds.cost.flops import phase_ratios
from est_ds.report.interactive import Look, look
from est_ds.studies.answers import Answers
from est_ds.studies.arms import ArmAnswer, Compared
from est_ds.studies.results import Results, RunResult
from est_ds.studies.runs import Runs, StudyRun
from est_ds.studies.times import known_ratios


@dataclass(frozen=True)
class Snapshot:
    """A study and its results so far; no run directory is needed."""

    runs: Runs
    answers: Answers
    results: Results

    @property
    def baseline(self) -> ArmAnswer:
        return self.answers.arms[0]

    @cached_property
    def looks(self) -> dict[str, Look]:
        """How every arm looks, the baseline black."""
        others = {arm.name: look(i) for i, arm in enumerate(self.answers.arms[1:])}
        return {self.baseline.name: look(None), **others}

    @cached_property
    def step_s(self) -> dict[str, float]:
        """Seconds a step by arm, as measured in turns: the baseline's, times the arm's ratio."""
        times, ratios = self.results.times, self.time_ratios
        if times is None or not ratios:
            return {}
        base_s = times.arms[self.baseline.name].step_s
        return {arm: base_s * ratio for arm, ratio in ratios.items()}

    @cached_property
    def time_ratios(self) -> dict[str, float]:
        """Step times over the baseline's, of arms that have not changed since."""
        return known_ratios(self.runs, self.results.times)

    @cached_property
    def costs(self) -> list[str]:
        """What losses can be drawn over, the budget that decides at the front."""
        known = ["tokens", "flops"] + (["seconds"] if self.step_s else [])
        return sorted(known, key=lambda cost: cost != self.answers.decides)

    def run(self, arm: ArmAnswer) -> StudyRun | None:
        """The run of an arm, by its first seed; None while its values are not known."""
        if arm.values is None:
            return None
        return self.runs.run(arm.name, next(iter(self.runs.file.seeds)), arm.values)

    def by_seed(self, arm: ArmAnswer) -> dict[int, RunResult]:
        """Finished runs of an arm at its values, those that diverged among them."""
        if arm.values is None:
            return {}
        keys = {s: self.runs.run(arm.name, s, arm.values).key for s in self.runs.file.seeds}
        runs = self.results.runs
        return {seed: runs[key] for seed, key in keys.items() if key in runs}

    def pairs(self, arm: ArmAnswer, compared: Compared | None) -> dict[int, float]:
        """Loss of an arm less the baseline's, in nats, by the seeds that both have; `compared` is
        the arm at a budget."""
        if compared is None:
            return {}
        dense = {r.seed: r.loss for r in self.answers.dense if r.steps == compared.steps}
        return {s: loss - dense[s] for s, loss in arm.losses.items() if dense.get(s) is not None}

    def spent(self, arm: ArmAnswer, steps: Sequence[int]) -> dict[str, list[float]]:
        """What a run of an arm has cost after so many steps, by cost.

        FLOPs are even within a phase; seconds go with them, as far as a whole run has them.
        """
        run = self.run(arm)
        if run is None:
            return {}
        design = self.runs.design(arm.name, run.values)
        lengths = {
            "sequence": design.config.data.sequence,
            "target_sequence": design.target_sequence,
        }
        ends, sums = [0], [0.0]
        for i, phase in enumerate(design.method.phases):
            ratio = phase_ratios(design.method, i, **lengths).model
            ends.append(phase.until_step)
            sums.append(sums[-1] + ratio * (phase.until_step - phase.from_step))
        parts = np.interp(steps, ends, np.array(sums) / sums[-1])
        found = {
            "tokens": [done * run.config.tokens_per_step for done in steps],
            "flops": (run.flops.model * parts).tolist(),
        }
        if arm.name in self.step_s:
            found["seconds"] = (run.steps * self.step_s[arm.name] * parts).tolist()
        return found

    def of_baseline(self, flops: Sequence[float]) -> dict[str, list[float]]:
        """What the baseline costs that computes so many FLOPs, by cost."""
        run = self.run(self.baseline)
        if run is None:
            return {}
        steps = [f / run.flops.model * run.steps for f in flops]
        found = {"flops": list(flops), "tokens": [s * run.config.tokens_per_step for s in steps]}
        if self.baseline.name in self.step_s:
            found["seconds"] = [s * self.step_s[self.baseline.name] for s in steps]
        return found
