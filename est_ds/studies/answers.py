"""What the results of a study say of every arm."""

from __future__ import annotations

from dataclasses import dataclass

from est_ds.studies.arms import ArmAnswer, Found, answer_arm, correct
from est_ds.studies.by_window import ByWindow
from est_ds.studies.cautions import cautions
from est_ds.studies.results import Results, RunResult
from est_ds.studies.runs import Runs, Wanted
from est_ds.studies.statistics import Curve, fit_curve


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
    found = Found(runs, wanted, results, ByWindow(results))
    dense = found.baseline_runs()
    curves = _curves(dense) if file.study.dense_curve else {}
    names = [baseline, *(name for name in file.arms if name != baseline)]
    arms = [answer_arm(found, name, curves) for name in names]
    for budget in file.study.budgets:
        correct(arms[1:], budget, wanted.screened, file.study.screen)
    warnings = cautions(found, arms, dense, curves)
    return Answers(tuple(arms), curves, tuple(dense), file.study.budgets[-1], warnings)


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
