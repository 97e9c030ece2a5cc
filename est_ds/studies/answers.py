"""What the results of a study say of every arm."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

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
    fit_curve,
    holm,
    paired_difference,
    seeds_for,
    t_interval,
    verdict,
)
from est_ds.studies.study_file import Values
from est_ds.studies.tasks import TaskAnswer, task_answers, unasked
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
class Answers:
    """What is known of a study.

    Attributes:
        arms: the baseline first.
        curves: of the baseline by seed, over FLOPs of `model`.
        dense: finished runs of the baseline at its tuned values, all budgets and seeds.
        decides: the budget that gives the verdict.
        warnings: what a reader must know.
    """

    arms: tuple[ArmAnswer, ...]
    curves: dict[int, Curve]
    dense: tuple[RunResult, ...]
    decides: str
    warnings: tuple[str, ...]


def answer(runs: Runs, wanted: Wanted, results: Results) -> Answers:
    """Compares what is finished; what is missing is None."""
    file, baseline = runs.file, runs.file.baseline.name
    found = _Found(runs, wanted, results, ByWindow(results))
    dense = found.baseline_runs()
    curves = _curves(dense) if file.study.dense_curve else {}
    names = [baseline, *(name for name in file.arms if name != baseline)]
    arms = [_arm(found, name, curves) for name in names]
    for budget in file.study.budgets:
        _correct(arms[1:], budget, wanted.screened, file.study.screen)
    warnings = (
        *_warnings(runs, wanted, results),
        *_of_data(found, names),
        *_unsure(arms[1:]),
        *_of_windows(found, arms[1:]),
        *unasked(file.study.evaluate, found.done),
        *_of_curves(file.study.dense_curve, curves, dense),
        *_of_shorter(found, dense, names),
    )
    return Answers(tuple(arms), curves, tuple(dense), file.study.budgets[-1], warnings)


@dataclass(frozen=True)
class _Found:
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


def _losses(results: Mapping[int, RunResult]) -> dict[int, float]:
    return {seed: r.loss for seed, r in results.items() if r.loss is not None}


def _curves(dense: list[RunResult]) -> dict[int, Curve]:
    """The baseline's curve by seed, of seeds whose runs are there."""
    curves = {}
    for seed in sorted({r.seed for r in dense}):
        of_seed = [r for r in dense if r.seed == seed and r.loss is not None]
        try:
            curves[seed] = fit_curve([r.flops for r in of_seed], [r.loss for r in of_seed])
        except ValueError:
            continue
    return curves


def _arm(found: _Found, name: str, curves: Mapping[int, Curve]) -> ArmAnswer:
    runs, results = found.runs, found.of_seeds(name)
    file, losses = runs.file, _losses(results)
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
    here, there = _losses(arm), _losses(baseline)
    diverged = tuple(seed for seed in arm if seed not in here and seed in there)
    difference = paired_difference(here, there) if here.keys() & there.keys() else None
    lost = [seed for seed in baseline if seed not in there and seed in here]
    unsure = ""
    if lost:
        unsure = f"the baseline diverged with seed {', '.join(map(str, lost))}"
    elif difference and difference.pairs > 1 and difference.spread is None:
        unsure = "all seeds differ alike, as runs do that are the same ones"
    return Compared(steps, difference, diverged=diverged, unsure=unsure)


def _correct(
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


def _unsure(arms: list[ArmAnswer]) -> list[str]:
    """Why arms have no verdict."""
    return [
        f"arm {arm.name} has no verdict at equal {budget}: {compared.unsure}"
        for arm in arms
        for budget, compared in arm.budgets.items()
        if compared.unsure
    ]


def _of_windows(found: _Found, arms: list[ArmAnswer]) -> list[str]:
    """Arms whose difference may be of the held-out text, and runs of which that is not known."""
    config, said = found.runs.first.config, []
    for budget in found.runs.file.study.budgets:
        at = {arm.name: arm.budgets[budget] for arm in arms if budget in arm.budgets}
        turned = [
            name for name, c in at.items() if c.windows and c.windows.could_turn(c.difference)
        ]
        if turned:
            said.append(
                f"at equal {budget} other held-out text could turn the sign of the difference of "
                f"{', '.join(turned)}; raise evaluate.sequences ({config.evaluate.sequences}) in a "
                f"study of its own"
            )
    if config.evaluate.windows and (missing := found.by_window.missing):
        folder = found.results.windows("").parent
        said.append(
            f"{missing} of the {found.by_window.asked} runs compared have no held-out losses by "
            f"window in {folder}; differences have no interval over windows where a pair lacks them"
        )
    return said


def _of_curves(
    wanted: Sequence[float], curves: Mapping[int, Curve], dense: list[RunResult]
) -> list[str]:
    """Why there is no gain though one was asked for."""
    budgets = len({r.steps for r in dense})
    if not wanted or curves or not dense:
        return []
    return [
        f"no gain: no curve fits the baseline's runs of {budgets} budgets (it takes three, whose "
        f"loss falls)"
    ]


def _of_shorter(found: _Found, dense: list[RunResult], names: list[str]) -> list[str]:
    """Warns where the baseline is better when it is trained for less, as of little text that is
    read often: an arm that is better than its longer runs may be no better than that."""
    by_steps: dict[int, dict[int, RunResult]] = {}
    for result in dense:
        by_steps.setdefault(result.steps, {})[result.seed] = result
    usual = _losses(found.of_seeds(names[0]))
    better = {}
    for steps, results in by_steps.items():
        losses = _losses(results)
        shared = losses.keys() & usual.keys()
        shorter = all(losses[seed] < usual[seed] for seed in shared)
        if shared and shorter and steps < found.runs.first.steps:
            better[steps] = losses
    if not better:
        return []
    steps = min(better, key=lambda steps: fmean(better[steps].values()))
    best, ahead = better[steps], []
    for name in names[1:]:
        losses = _losses(found.of_seeds(name))
        if (shared := losses.keys() & best.keys()) and all(losses[s] < best[s] for s in shared):
            ahead.append(name)
    least = f"held-out loss {fmean(best.values()):.4f}, with each seed"
    return [
        f"{names[0]} is better after {steps:,} steps than after {found.runs.first.steps:,} "
        f"({least}): what is better than its longer runs need not pay. Better than its best with "
        f"each seed: {', '.join(ahead) or 'no arm'}"
    ]


def _warnings(runs: Runs, wanted: Wanted, results: Results) -> list[str]:
    file, found = runs.file, []
    if len(file.seeds) == 1:
        found.append("one seed: no interval, no verdict; a pilot shows what to look at next")
    if untuned := [arm.name for arm in file.arms.values() if not arm.grid[0]]:
        found.append(
            f"nothing was tuned (tune) for {', '.join(untuned)}; at the baseline's learning rate "
            f"an arm may look worse than it is"
        )
    for arm in file.arms.values():
        if arm.grid[0] and (chosen := wanted.chosen[arm.name]) is not None:
            found += _edges(arm.name, arm.grid, chosen)
    devices = sorted({r.device for r in results.runs.values() if r.device})
    if len(devices) > 1:
        found.append(f"runs on different hardware: {', '.join(devices)}")
    if results.times and results.times.busy is not None and results.times.busy > 0.2:
        found.append(
            f"other programs kept {results.times.busy:.1f} processors busy while step times were "
            f"measured; measure again on a quiet machine (--time-only)"
        )
    strangers = results.runs.keys() - wanted.by_key.keys()
    if strangers:
        found.append(
            f"{len(strangers)} runs in {results.file} belong to no arm of this study file as it "
            f"is now, and are left out"
        )
    return found


def _edges(arm: str, grid: tuple[Values, ...], chosen: Values) -> list[str]:
    """Tuned fields whose best value is the smallest or the largest that was tried."""
    found = []
    for i, (name, text) in enumerate(chosen):
        tried = [json.loads(value) for value in dict.fromkeys(v[i][1] for v in grid)]
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in tried)
        if numbers and len(tried) > 1 and json.loads(text) in (min(tried), max(tried)):
            shown = ", ".join(f"{v:g}" for v in tried)
            found.append(
                f"arm {arm}: the best {name}={json.loads(text):g} is at the edge of its grid "
                f"({shown}); add values beyond it"
            )
    return found


def _of_data(found: _Found, names: list[str]) -> list[str]:
    """Arms that have read other batches than the baseline though steps and seed are equal."""
    wrong = []
    baseline = found.of_seeds(names[0])
    for name in names[1:]:
        for seed, result in found.of_seeds(name).items():
            other = baseline.get(seed)
            if other is None or result.loss is None or other.loss is None:
                continue  # one that diverged was cut short
            if result.steps == other.steps and result.data != other.data:
                wrong.append(
                    f"arm {name}, seed {seed}: it has read other batches than the baseline; the "
                    f"difference is not paired"
                )
    return wrong


def finite(value: float | None) -> float | None:
    """A number as JSON has it."""
    return value if value is not None and math.isfinite(value) else None
