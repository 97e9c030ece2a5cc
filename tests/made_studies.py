"""Studies of the tiny run, and results that nobody has trained."""

from __future__ import annotations

from pathlib import Path

from est_ds.studies.answers import answer
from est_ds.studies.results import ArmTimes, Header, RunResult, Times, read_results
from est_ds.studies.runs import Chooser, Runs, StudyRun, wanted_runs
from est_ds.studies.study_file import load_study
from est_ds.studies.times import known_ratios

LAYERS = {"name": "raptr", "phases": [{"until": 0.5, "layers": 2}, {"until": 1.0}]}
HALF_LAYERS = {"name": "layer_drop", "drop": 0.5}
DENSE = {"method": {"name": "full"}}


def result_of(run: StudyRun, loss: float | None, data: tuple[str, str] = ("a", "b")) -> RunResult:
    """What a run would have found that came to this loss."""
    return RunResult(
        **run.facts,
        parameters=1,
        loss=loss,
        data=data,
        device="cpu",
    )


def answered(file: Path, loss_of, times: Times | None = None):
    """The answers of a study whose runs all came to the loss that `loss_of` says."""
    runs = Runs(load_study(file))
    results = read_results(runs.file.results)
    results.begin(Header(study="x", corpora=None))
    if times:
        results.add_times(times)
    while True:  # until no run waits for a grid any more
        chooser = Chooser(results.losses, known_ratios(runs, results.times))
        wanted = wanted_runs(runs, chooser)
        todo = [run for run in wanted.runs if run.key not in results.runs]
        if not todo:
            return runs, wanted, results, answer(runs, wanted, results)
        for run in todo:
            results.add(result_of(run, loss_of(run)))


def times_of(file: Path, arms: dict[str, tuple[float, float]]) -> Times:
    """Step times of arms, each with its ratio and spread, on a machine that was busy."""
    runs = Runs(load_study(file))
    measured = {
        arm: ArmTimes(
            run=runs.timed_key(arm), ratio=ratio, cpu_ratio=ratio, step_s=0.2 * ratio, spread=spread
        )
        for arm, (ratio, spread) in arms.items()
    }
    return Times(device="cpu", processes=1, arms=measured, busy=1.0, measured="")


def dense_loss(run: StudyRun) -> float:
    """A curve of losses with an offset for every seed."""
    return 3.0 + 2.0 * (run.flops.model / 1e9) ** -0.5 + 0.02 * run.seed
