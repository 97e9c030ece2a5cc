"""What is known of the arms of a study, each against the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from est_ds.studies.by_window import ByWindow, OverWindows
from est_ds.studies.results import Results, RunResult
from est_ds.studies.runs import Runs, StudyRun, Wanted
from est_ds.studies.statistics import (
    Curve,
    Difference,
    Gain,
    Interval,
    compute_gain,
    detectable,
    holm,
    paired_difference,
    seeds_for,
    t_interval,
    verdict,
)
from est_ds.studies.study_file import Values
from est_ds.studies.tasks import TaskAnswer, task_answers
from est_ds.studies.times import known_ratios

# Step times that spread further, over the rounds, say nothing of equal seconds.
STEADY = 0.05


@dataclass(frozen=True)
class Compared:
    """An arm and the baseline at one budget.

    Attributes:
        steps: of the baseline, which equal the arm's run.
        difference: of their losses; None while they share no finished seed.
        corrected: its p value, corrected for the number of arms (Holm).
        verdict: None without interval.
        more_seeds: of an undecided one: how many more would show the difference seen, if it is
            the true one, with a chance of 80 %; None: over 1,000.
        diverged: seeds of the arm that diverged where the baseline did not.
        unsure: why there is no verdict though there are several seeds; empty otherwise.
        windows: of the difference, over the choice of held-out text; None without losses by window.
    """

    steps: int
    difference: Difference | None
    corrected: float | None = None
    verdict: str | None = None
    more_seeds: int | None = None
    diverged: tuple[int, ...] = ()
    unsure: str = ""
    windows: OverWindows | None = None


@dataclass(frozen=True)
class ArmAnswer:
    """What is known of an arm.

    Attributes:
        values: of the tuned fields, as JSON; None while its grid is not finished.
        losses: held-out loss by seed at the end of the arm's run.
        flops_ratio, blocks_ratio: FLOPs of its run over those of the baseline's.
        time_ratio: step time over the baseline's, measured in turns; None if it was not.
        time_spread: of the ratio over the rounds (`results.ArmTimes`).
        budgets: by name; empty of the baseline.
        gain: in FLOPs; None without a curve of the baseline.
        gain_seconds: in seconds; None without step times.
        tasks: by name, those that the study asks (`evaluate`).
    """

    name: str
    values: Values | None
    losses: dict[int, float]
    loss: Interval | None
    flops_ratio: float | None
    blocks_ratio: float | None
    time_ratio: float | None
    time_spread: float | None
    budgets: dict[str, Compared]
    gain: Gain | None = None
    gain_seconds: Gain | None = None
    tasks: dict[str, TaskAnswer] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """Finished runs, looked up by what they are."""

    runs: Runs
    wanted: Wanted
    results: Results
    by_window: ByWindow

    @property
    def time_ratios(self) -> dict[str, float]:
        return known_ratios(self.runs, self.results.times)

    def run(self, arm: str, seed: int, steps: int | None = None) -> StudyRun | None:
        values = self.wanted.chosen[arm]
        if values is None:
            return None
        run = self.runs.run(arm, seed, values, steps)
        usual = self.runs.run(arm, seed, values)
        return usual if run.steps == usual.steps else run

    def result(self, arm: str, seed: int, steps: int | None = None) -> RunResult | None:
        run = self.run(arm, seed, steps)
        return self.results.runs.get(run.key) if run else None

    def of_seeds(self, arm: str, steps: int | None = None) -> dict[int, RunResult]:
        found = {seed: self.result(arm, seed, steps) for seed in self.runs.file.seeds}
        return {seed: result for seed, result in found.items() if result}

    @property
    def done(self) -> list[RunResult]:
        """Those of the study that are finished."""
        runs = self.results.runs
        return [runs[key] for key in self.wanted.by_key if key in runs]

    def baseline_runs(self) -> list[RunResult]:
        name = self.runs.file.baseline.name
        chosen = self.wanted.chosen[name]
        keys = [r.key for r in self.wanted.runs if r.arm == name and r.values == chosen]
        return [self.results.runs[key] for key in keys if key in self.results.runs]


def losses_of(results: Mapping[int, RunResult]) -> dict[int, float]:
    """Held-out losses by seed, of runs that did not diverge."""
    return {seed: r.loss for seed, r in results.items() if r.loss is not None}


def answer_arm(found: Found, name: str, curves: Mapping[int, Curve]) -> ArmAnswer:
    """Compares an arm, as far as its runs and the baseline's are finished; without verdicts.

    Args:
        curves: of the baseline by seed.
    """
    runs, results = found.runs, found.of_seeds(name)
    file, losses = runs.file, losses_of(results)
    first = next(iter(file.seeds))
    run, base = found.run(name, first), found.run(file.baseline.name, first)
    times, measured = found.time_ratios.get(name), found.results.times
    ratios = (None, None)
    if run and base:
        ratios = (run.flops.model / base.flops.model, run.flops.blocks / base.flops.blocks)
    # Of the baseline's own config: it takes as long, and costs as much, whatever was measured.
    is_same = run is not None and base is not None and run.key == base.key
    budgets = {}
    if name != file.baseline.name:
        for budget, steps in found.wanted.matched[name].items():
            there = found.of_seeds(file.baseline.name, steps)
            compared = _compared(results, there, steps)
            budgets[budget] = replace(compared, windows=found.by_window.compare(results, there))
    known = ArmAnswer(
        name=name,
        values=found.wanted.chosen[name],
        losses=losses,
        loss=t_interval(list(losses.values())) if losses else None,
        flops_ratio=ratios[0],
        blocks_ratio=ratios[1],
        time_ratio=times,
        time_spread=measured.arms[name].spread if times and measured and not is_same else None,
        budgets=budgets,
        tasks=task_answers(file.study.evaluate, results),
    )
    shared = curves.keys() & losses.keys()
    if name == file.baseline.name or not shared or not run or not base:
        return known
    if is_same:
        one = Gain(Interval(1.0, 1.0, 1.0), "", len(shared))
        return replace(known, gain=one, gain_seconds=one if times else None)
    costs = {seed: run.flops.model for seed in losses}
    gains = {"gain": compute_gain(curves, losses, costs)}
    if times:
        # In the curve's unit: what the baseline computes in as many seconds.
        per_step = base.flops.model / base.steps
        seconds = {seed: run.steps * times * per_step for seed in losses}
        gains["gain_seconds"] = compute_gain(curves, losses, seconds)
    return replace(known, **gains)


def _compared(
    arm: Mapping[int, RunResult], baseline: Mapping[int, RunResult], steps: int
) -> Compared:
    here, there = losses_of(arm), losses_of(baseline)
    diverged = tuple(seed for seed in arm if seed not in here and seed in there)
    difference = paired_difference(here, there) if here.keys() & there.keys() else None
    lost = [seed for seed in baseline if seed not in there and seed in here]
    unsure = ""
    if lost:
        unsure = f"the baseline diverged with seed {', '.join(map(str, lost))}"
    elif difference and difference.pairs > 1 and difference.spread is None:
        unsure = "all seeds differ alike, as runs do that are the same ones"
    return Compared(steps, difference, diverged=diverged, unsure=unsure)


def correct(
    arms: list[ArmAnswer], budget: str, screened: Mapping[str, float], screen: float | None
) -> None:
    """Adds corrected p values and verdicts.

    An arm that was screened out counts among the tests, as one that shows nothing: else those that
    a lucky first seed has kept would be corrected for fewer.
    """
    at = [arm.budgets[budget] if budget in arm.budgets else None for arm in arms]
    p_values = [
        1.0 if arm.name in screened else c.difference.p if c and c.difference else None
        for arm, c in zip(arms, at)
    ]
    corrected = holm(p_values)
    tests = sum(p is not None for p in corrected)
    for arm, compared, p in zip(arms, at, corrected):
        if compared is None:
            continue
        if arm.name in screened and not compared.diverged:
            far = f"{screened[arm.name]:.3f} nats behind on the first seed, more than {screen:g}"
            compared, p = replace(compared, unsure=compared.unsure or far), None
        if budget == "seconds" and (arm.time_spread or 0.0) > STEADY:
            unsure = f"its step times spread by {arm.time_spread:.0%}"
            compared = replace(compared, unsure=compared.unsure or unsure)
        arm.budgets[budget] = _judged(compared, p, tests)


def _judged(compared: Compared, p: float | None, tests: int) -> Compared:
    """Adds the verdict; what could be seen, and how many seeds it takes, are by as many tests."""
    difference = compared.difference
    if difference and difference.spread:
        seen = detectable(difference.spread, difference.pairs, max(1, tests))
        difference = replace(difference, detectable=seen)
    compared = replace(compared, difference=difference, corrected=p)
    if compared.unsure:
        return compared
    if compared.diverged:
        return replace(compared, verdict="costs")
    if difference is None or difference.spread is None:
        return compared
    said, more = verdict(difference, p), None
    if said == "undecided":
        seeds = seeds_for(difference.interval.mean, difference.spread, max(1, tests))
        more = None if seeds is None else max(1, seeds - difference.pairs)
    return replace(compared, verdict=said, more_seeds=more)
