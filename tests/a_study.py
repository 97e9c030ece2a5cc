"""A study by numbers: results of plausible size, of runs that nobody has trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml

from cases.tiny import TINY_MODEL
from est_ds.studies.answers import Answers, answer
from est_ds.studies.results import ArmTimes, Header, Results, RunResult, Times, read_results
from est_ds.studies.runs import Chooser, Runs, StudyRun, wanted_runs
from est_ds.studies.study_file import load_study
from est_ds.studies.times import known_ratios

BASE = {
    "run_dir": "unset",
    "steps": 400,
    "model": TINY_MODEL,
    "method": {"name": "full"},
    "data": {"train": "absent", "valid": "absent", "tokenizer": "absent", "sequence": 64},
    "batch": {"global": 8, "micro": 2},
    "optimizer": {"lr": 2e-3},
    "checkpoint": {"every": 100},
    "evaluate": {"every": 20, "sequences": 10},
}
RAPTR = {"name": "raptr", "phases": [{"until": 0.5, "layers": 2}, {"until": 1.0, "layers": 4}]}
LATE = {"name": "est", "phases": [{"name": "a", "until": 0.4, "layers": 0.5}, {"until": 1.0}]}
STUDY = {
    "base": "base.yaml",
    "baseline": "dense",
    "arms": {
        "dense": {},
        "raptr": {"method": RAPTR},
        "late": {"method": LATE},
        "hot": {"method": {"name": "layer_drop", "drop": 0.2}},
    },
    "seeds": [0, 1, 2],
    "tune": {"optimizer.lr": [1e-3, 2e-3, 4e-3]},
    "budgets": ["tokens", "seconds", "flops"],
    "dense_curve": [0.5, 0.7, 0.85, 1.0, 1.2],
}
# Of an arm's loss against what a baseline of its FLOPs would have, and of its step time.
EFFECTS = {"dense": 0.0, "raptr": 0.03, "late": -0.02, "hot": 0.004}
RATIOS = {"dense": 1.0, "raptr": 0.81, "late": 0.84, "hot": 0.9}
BEST_LR = 2e-3


def make_study(folder: Path, **changes) -> SimpleNamespace:
    """The runs of a study file in a folder, and no results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    file = folder / "study.yaml"
    file.write_text(
        yaml.safe_dump({"study_dir": str(folder / "study"), **STUDY, **changes}, sort_keys=False)
    )
    runs = Runs(load_study(file))
    results = Results(runs.file.results)
    results.begin(Header(study="0" * 16, corpora=None))
    return SimpleNamespace(runs=runs, results=results, file=file)


def measure(study: SimpleNamespace) -> None:
    """Adds step times."""
    arms = {
        arm: ArmTimes(
            run=study.runs.timed_key(arm),
            ratio=ratio,
            cpu_ratio=ratio,
            step_s=0.5 * ratio,
            spread=0.01,
        )
        for arm, ratio in RATIOS.items()
        if arm in study.runs.file.arms
    }
    study.results.add_times(
        Times(device="cpu", processes=1, arms=arms, busy=0.1, measured="2026-01-01T00:00:00+00:00")
    )


def train(study: SimpleNamespace, most: int | None = None) -> None:
    """Finishes runs, all that are wanted or so many."""
    results = study.results
    while most is None or len(results.runs) < most:
        ratios = known_ratios(study.runs, results.times)
        wanted = wanted_runs(study.runs, Chooser(results.losses, ratios))
        todo = [run for run in wanted.runs if run.key not in results.runs]
        if not todo:
            return
        for run in todo if most is None else todo[: most - len(results.runs)]:
            results.add(result_of(study.runs, run))


def result_of(runs: Runs, run: StudyRun) -> RunResult:
    """What a run found, by a law of its FLOPs; the same for the same run."""
    random = np.random.default_rng(int(run.key, 16))
    rate = float(dict(run.values).get("optimizer.lr", BEST_LR))
    seed = np.random.default_rng(run.seed).normal(0, 0.01)
    loss = law(run.flops.model) + EFFECTS.get(run.arm, 0.0) + seed + random.normal(0, 0.002)
    loss += 0.05 * np.log2(rate / BEST_LR) ** 2
    every = run.config.evaluate.every
    done = [*range(every, run.steps, every), run.steps]
    curve = [(n, float(loss + 1.5 * (1 - n / run.steps) ** 2)) for n in done]
    return RunResult(
        **run.facts,
        parameters=runs.parameters(run),
        loss=float(loss),
        bits_per_byte=float(loss) / 2.5,
        curve=curve,
        data=("0" * 16, "1" * 16),
        boundaries=_boundaries(runs, run, float(loss)),
        device="cpu",
        versions={"est_ds": "0.1.0", "torch": "2.13.0+cpu"},
        finished="2026-01-01T00:00:00+00:00",
    )


def law(flops: float) -> float:
    """Held-out loss of the baseline."""
    return 3.0 + 0.8 * (flops / 3e12) ** -0.3


def _boundaries(runs: Runs, run: StudyRun, loss: float) -> list[dict]:
    phases = runs.design(run.arm, run.values).method.phases
    found = []
    for before, after in zip(phases, phases[1:]):
        full = loss + 1.5 * (1 - after.from_step / run.steps) ** 2
        for side, phase, above in (("before", before, 0.1), ("after", after, 0.0)):
            losses = {"full_loss": full, "subnetwork_loss": full + above}
            line = {"boundary": side, "phase": phase.name, "plans": 4, **losses}
            found.append({"step": after.from_step, **line})
    return found


def answers_of(study: SimpleNamespace) -> Answers:
    """What the results on disk say."""
    results = read_results(study.runs.file.results)
    ratios = known_ratios(study.runs, results.times)
    wanted = wanted_runs(study.runs, Chooser(results.losses, ratios))
    return answer(study.runs, wanted, results)
