"""What a reader of a study must know before believing its answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from est_ds.studies.arms import ArmAnswer, Found, losses_of
from est_ds.studies.results import RunResult
from est_ds.studies.statistics import Curve
from est_ds.studies.study_file import Values
from est_ds.studies.tasks import unasked

WELL_FITTED = 0.02  # the part by which gains of the baseline's own runs may differ from 1, unsaid


def cautions(
    found: Found, arms: list[ArmAnswer], dense: list[RunResult], curves: Mapping[int, Curve]
) -> tuple[str, ...]:
    """Warnings, each one line.

    Args:
        arms: the baseline first.
        dense: finished runs of the baseline at its tuned values.
        curves: of the baseline by seed.
    """
    study, names = found.runs.file.study, [arm.name for arm in arms]
    return (
        *_of_study(found),
        *_of_data(found, names),
        *_unsure(arms[1:]),
        *_of_windows(found, arms[1:]),
        *unasked(study.evaluate, found.done),
        *_of_curves(study.dense_curve, curves, dense),
        *_of_fits(curves, dense),
        *_of_shorter(found, dense, names),
    )


def _unsure(arms: list[ArmAnswer]) -> list[str]:
    """Why arms have no verdict."""
    return [
        f"arm {arm.name} has no verdict at equal {budget}: {compared.unsure}"
        for arm in arms
        for budget, compared in arm.budgets.items()
        if compared.unsure
    ]


def _of_windows(found: Found, arms: list[ArmAnswer]) -> list[str]:
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
    if not wanted or curves or not dense:
        return []
    budgets = len({r.steps for r in dense})
    return [
        f"no gain: no curve fits the baseline's runs of {budgets} budgets (it takes three, whose "
        f"loss falls)"
    ]


def _of_fits(curves: Mapping[int, Curve], dense: list[RunResult]) -> list[str]:
    """How far the gain of a single seed may be off: as far as those of the baseline's own runs,
    which are 1 where the curve goes through them."""
    own = [
        curves[r.seed].cost_beyond(r.loss) / r.flops
        for r in dense
        if r.seed in curves and r.loss is not None
    ]
    if all(abs(gain - 1) <= WELL_FITTED for gain in own):
        return []
    most = "infinity" if math.isinf(max(own)) else f"{max(own):.2f}"
    return [
        f"the baseline's own runs, read on the curves through them, have gains of {min(own):.2f} "
        f"to {most}: between these the gain of one seed says nothing"
    ]


def _of_shorter(found: Found, dense: list[RunResult], names: list[str]) -> list[str]:
    """Warns where the baseline is better when it is trained for less, as of little text that is
    read often: an arm that is better than its longer runs may be no better than that."""
    by_steps: dict[int, dict[int, RunResult]] = {}
    for result in dense:
        by_steps.setdefault(result.steps, {})[result.seed] = result
    usual = losses_of(found.of_seeds(names[0]))
    better = {}
    for steps, results in by_steps.items():
        losses = losses_of(results)
        shared = losses.keys() & usual.keys()
        shorter = all(losses[seed] < usual[seed] for seed in shared)
        if shared and shorter and steps < found.runs.first.steps:
            better[steps] = losses
    if not better:
        return []
    steps = min(better, key=lambda steps: fmean(better[steps].values()))
    best, ahead = better[steps], []
    for name in names[1:]:
        losses = losses_of(found.of_seeds(name))
        if (shared := losses.keys() & best.keys()) and all(losses[s] < best[s] for s in shared):
            ahead.append(name)
    least = f"held-out loss {fmean(best.values()):.4f}, with each seed"
    return [
        f"{names[0]} is better after {steps:,} steps than after {found.runs.first.steps:,} "
        f"({least}): what is better than its longer runs need not pay. Better than its best with "
        f"each seed: {', '.join(ahead) or 'no arm'}"
    ]


def _of_study(known: Found) -> list[str]:
    """What is not tuned, at the edge of a grid, of different machines, or of no arm."""
    file, wanted, results, found = known.runs.file, known.wanted, known.results, []
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


def _of_data(found: Found, names: list[str]) -> list[str]:
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
