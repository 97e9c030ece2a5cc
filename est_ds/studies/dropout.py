"""`est-ds analyse dropout STUDY`: is a subnetwork step structural dropout?

How the arms compare is what `compare` says of the results. What they draw is measured here, of all
arms at the same weights and on the same batches of training, so that a study that keeps no
checkpoint can be measured too: at the weights that its runs begin with, or at those of another run
of the same model. Losses at the boundaries of the runs are those that they recorded.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from est_ds.analysis.dropout import (
    Draws,
    Effort,
    MicroBatch,
    drawn_phases,
    measure_draws,
    spread_of_batches,
)
from est_ds.analysis.output import check_folder, of_run
from est_ds.analysis.subject import Wanted, open_weights
from est_ds.checkpoints.store import LATEST, Store
from est_ds.config.run_config import RunConfig
from est_ds.config.run_file import load_run
from est_ds.data.loader import Portion
from est_ds.design import Design, make_design
from est_ds.errors import UserError
from est_ds.run.directory import fixed_fields
from est_ds.run.prepare import prepare
from est_ds.slicing.build import empty_model
from est_ds.studies.answers import Answers
from est_ds.studies.boundary_plot import boundaries_of
from est_ds.studies.compare import Session, Wish, open_study
from est_ds.studies.queue import processes_of
from est_ds.studies.runs import StudyRun
from est_ds.studies.snapshot import Snapshot
from est_ds.studies.statistics import paired_difference
from est_ds.studies.text import answers_json, headline

FIRST = "first"
# What two arms may differ in that draw the same kind of subnetwork.
OF_DRAWS = ("method.compute", "method.draw", "batch.micro")


@dataclass(frozen=True)
class At:
    """The weights to measure at.

    Attributes:
        run: a run file or a run directory; None: the baseline's, with the first seed.
        step: `first`, `latest`, or a number of steps; None: `latest`, or `first` where the
            baseline's run has no checkpoint.
    """

    run: str | None = None
    step: str | None = None


@dataclass(frozen=True)
class _State:
    """Weights by their Hugging Face names, after so many steps of a run."""

    run: Path
    step: int
    weights: dict[str, Tensor]


def measure_dropout(path: str, at: At, effort: Effort) -> tuple[dict[str, Any], Path]:
    """Returns what the study says, as it stands in the file of numbers, and the folder for it.

    Raises:
        UserError: the study, the checkpoint or the corpora do not fit, or nothing can be measured.
    """
    effort.check()
    began = time.monotonic()
    session = open_study(path, Wish())
    runs = _first_runs(session)
    baseline = runs[session.file.baseline.name]
    state = _state(baseline, at)
    designs = {name: make_design(run.config) for name, run in runs.items()}
    folder, phases, left_out = of_run(session.file.folder), {}, {}
    check_folder(folder)
    for name, design in designs.items():
        if not _fits(design, state.weights):
            left_out[name] = "its model has other parameters"
        elif found := drawn_phases(design, effort.draws, f"arm {name}"):
            phases[name] = found
        else:
            left_out[name] = "it draws nothing of a whole model"
    _check_some(baseline, state, phases, left_out)
    measured = {}
    for name, found in phases.items():
        batches = _batches(runs[name], state.step, effort)
        measured[name] = measure_draws(designs[name], state.weights, batches, found)
    answers = session.answers()
    numbers = {
        "study": str(session.file.folder),
        "run": str(state.run),
        "step": state.step,
        "draws": effort.draws,
        "batches": effort.batches,
        "sequences": baseline.config.batch.global_,
        "spread_of_batches": _spread(baseline, state, effort),
        "arms": measured,
        "left_out": left_out,
        "boundaries": _boundaries(session, answers),
        "alike": _alike(runs, answers),
        "headline": headline(answers) if session.results.runs else "",
        "compare": json.loads(answers_json(session.runs, answers, session.results)),
        "seconds": time.monotonic() - began,
    }
    return numbers, folder


def _first_runs(session: Session) -> dict[str, StudyRun]:
    """Every arm's run with the first seed, at its best values as far as they are known."""
    file, chosen = session.file, session.wanted().chosen
    seed = next(iter(file.seeds))
    values = {n: arm.grid[0] if chosen[n] is None else chosen[n] for n, arm in file.arms.items()}
    return {name: session.runs.run(name, seed, own) for name, own in values.items()}


def _state(baseline: StudyRun, at: At) -> _State:
    """Opens the weights to measure at.

    Raises:
        UserError: there are none, or a run file is wrong.
    """
    config = baseline.config if at.run is None else load_run(at.run)
    has_none = at.run is None and not Store.of(config.run_dir).steps()
    step = at.step or (FIRST if has_none else LATEST)
    if step != FIRST:
        if has_none:
            raise UserError(
                f"--step={step}: the baseline's run {config.run_dir!r} has no checkpoint; train it "
                f"(est-ds compare) with keep_checkpoints: true, or use --step first."
            )
        design, done, weights = open_weights(Wanted(at.run or config.run_dir, (), step))
        return _State(Path(design.config.run_dir), done, weights)
    return _State(Path(config.run_dir), 0, make_design(config).first_model().state_dict())


def _fits(design: Design, weights: dict[str, Tensor]) -> bool:
    shapes = {name: part.shape for name, part in empty_model(design.hf_config).state_dict().items()}
    return shapes == {name: part.shape for name, part in weights.items()}


def _check_some(
    baseline: StudyRun, state: _State, phases: dict[str, Any], left_out: dict[str, str]
) -> None:
    if not _fits(make_design(baseline.config), state.weights):
        raise UserError(
            f"--run={str(state.run)!r} has other parameters than the baseline {baseline.arm!r}; "
            f"name a run of the study's model, or leave it out."
        )
    if not phases:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise UserError(
            f"no arm of the study draws anything ({reasons}); add arms of a method that does, or "
            f"with dropout (model.attention_dropout)."
        )


def _batches(run: StudyRun, step: int, effort: Effort) -> list[list[MicroBatch]]:
    """The global batches of training from a step on, cut into the arm's micro-batches."""
    # Not the run's own folder, from which a study may have removed the checkpoints.
    config = run.config.model_copy(update={"run_dir": str(Path(run.config.run_dir) / "unbegun")})
    train = prepare(config, processes_of(run)).train
    portion = Portion(0, 1, config.batch.micro)
    return [list(train.micro_batches(step + i, portion)) for i in range(effort.batches)]


def _spread(baseline: StudyRun, state: _State, effort: Effort) -> float | None:
    """How much the full model's gradient differs from batch to batch, over its mean square."""
    draws = Draws(make_design(baseline.config), state.weights)
    batches = _batches(baseline, state.step, effort)
    return spread_of_batches([draws.full(batch)[1] for batch in batches])


def _boundaries(session: Session, answers: Answers) -> dict[str, list[dict[str, Any]]]:
    """What the runs of every arm recorded at their phase boundaries, means over the seeds."""
    snapshot = Snapshot(session.runs, answers, session.results)
    found = {}
    for arm in answers.arms:
        done = [result for result in snapshot.by_seed(arm).values() if result.loss is not None]
        if sides := boundaries_of(done):
            found[arm.name] = [{**asdict(side), "seeds": len(done)} for side in sides]
    return found


def _alike(runs: dict[str, StudyRun], answers: Answers) -> list[dict[str, Any]]:
    """Arms that differ from a sliced one with a draw a step in how they draw or compute, and their
    losses less that one's, by seed."""
    losses = {arm.name: arm.losses for arm in answers.arms}
    groups: dict[str, list[str]] = defaultdict(list)
    for name, run in runs.items():
        groups[_kind(run.config, dict(run.values))].append(name)
    found = []
    for names in groups.values():
        plain = [n for n in names if not _settings(runs[n])]
        for name in (n for n in names if plain and n != plain[0]):
            known = losses[name].keys() & losses[plain[0]].keys()
            difference = paired_difference(losses[name], losses[plain[0]]) if known else None
            found.append(
                {
                    "arm": name,
                    "like": plain[0],
                    "differs": _settings(runs[name]),
                    "difference": difference and asdict(difference),
                }
            )
    return found


def _settings(run: StudyRun) -> dict[str, str]:
    """What of `compute` and `draw` is not the default."""
    usual = {"compute": "sliced", "draw": "step"}
    return {k: v for k, d in usual.items() if (v := run.config.method.get(k, d)) != d}


def _kind(config: RunConfig, tuned: dict[str, str]) -> str:
    """Names what is trained, but for `OF_DRAWS` and what was tuned."""
    fields = fixed_fields(config, defaults=False)
    kept = {k: v for k, v in fields.items() if k not in OF_DRAWS and k not in tuned}
    return json.dumps(kept, sort_keys=True, default=list)
