"""What makes the arms of a study comparable; what does not is refused before anything trains."""

from __future__ import annotations

from itertools import product
from typing import Any

from est_ds.config.run_config import RunConfig
from est_ds.design import Design
from est_ds.errors import UserError
from est_ds.plans.lr import learning_rate
from est_ds.studies.runs import Chooser, Runs, wanted_runs
from est_ds.studies.study_file import StudyFile

# Of the highest rate of a run; a run that ends above it is not decayed.
DECAYED = 0.25
RATE = "optimizer.lr"
# What must be equal for held-out losses to be comparable.
SHARED = ("data", "objective", "precision", "evaluate.sequences", "evaluate.choice")


def check_study(runs: Runs) -> None:
    """Checks every arm, and that their losses can be compared.

    Raises:
        UserError: the fields of an arm do not fit, it reads or evaluates something other than the
            baseline, or its learning rate is not decayed at the end.
    """
    file = runs.file
    base = runs.design(file.baseline.name, file.baseline.grid[0])
    for arm in file.arms.values():
        for values in arm.grid:
            design = runs.design(arm.name, values)
            _check_alike(arm.name, design.config, base.config)
            _check_decayed(arm.name, design)
    _check_seeds(runs)
    if "seconds" in file.study.budgets:
        _check_grids(file)
    try:
        wanted = wanted_runs(runs, Chooser({}, {}, guess=True)).runs
        of_baseline = {r.steps for r in wanted if r.arm == file.baseline.name}
        # Whether a rate decays does not depend on how high it is.
        grid = {tuple(pair for pair in v if pair[0] != RATE): v for v in file.baseline.grid[::-1]}
        for values, steps in product(grid.values(), of_baseline - {base.config.steps}):
            _check_decayed(file.baseline.name, runs.design(file.baseline.name, values, steps))
    except UserError as e:
        raise UserError(
            f"{e} (The baseline also trains fewer steps, for equal FLOPs and for dense_curve: give "
            f"warm-up, decay and phases as fractions.)"
        ) from None


def _check_seeds(runs: Runs) -> None:
    """Refuses seeds that train the baseline's run again."""
    file, seen = runs.file, {}
    for seed in file.seeds:
        key = runs.run(file.baseline.name, seed, file.baseline.grid[0]).key
        if (other := seen.setdefault(key, seed)) != seed:
            raise UserError(
                f"seeds: seed {seed} would train the run of seed {other} again, since no list has "
                f"other numbers there; change one, or leave the seed out."
            )


def _check_grids(file: StudyFile) -> None:
    """Refuses to tune what changes the time of a step, where seconds are compared."""
    for arm in file.arms.values():
        for field, _ in arm.grid[0]:
            if field.partition(".")[0] not in ("optimizer", "schedule"):
                raise UserError(
                    f"arm {arm.name!r}: tune has {field}, which may change the time of a step, and "
                    f"budgets has seconds; make arms of its values, or leave one of the two out."
                )


def _check_alike(arm: str, config: RunConfig, base: RunConfig) -> None:
    for field in SHARED:
        here, there = config.at(field), base.at(field)
        if here != there:
            raise UserError(
                f"arm {arm!r}: {field}={_shown(here)} differs from the baseline's {_shown(there)}, "
                f"so that their losses cannot be compared; set it for all arms (under `set`), or "
                f"make another study."
            )
    for field in ("parallel.processes", "parallel.pipe"):
        if config.at(field) != base.at(field):
            raise UserError(
                f"arm {arm!r}: {field}={config.at(field)} differs from the baseline's "
                f"{base.at(field)}, and all runs of a study take equal places on the machine; set "
                f"it for all arms (under `set`)."
            )
    if config.tokens_per_step != base.tokens_per_step:
        raise UserError(
            f"arm {arm!r}: batch.global={config.batch.global_} differs from the baseline's "
            f"{base.batch.global_}, so that equal steps are not equal tokens; set it for all arms "
            f"(under `set`), or make another study."
        )


def _shown(value: Any) -> str:
    text = repr(value.model_dump(exclude_defaults=True) if hasattr(value, "model_dump") else value)
    return text if len(text) <= 120 else text[:117] + "..."


def _check_decayed(arm: str, design: Design) -> None:
    """Refuses a rate that ends high: of the schedule alone, since a phase's factor is no decay of
    it, and with the phases' factors."""
    config, phases = design.config, design.method.phases
    steps, stride = config.steps, max(1, config.steps // 200)
    for factors in ((), phases):
        rates = [
            learning_rate(config.schedule, config.optimizer.lr, step, steps, factors)
            for step in (*range(0, steps, stride), steps - 1)
        ]
        last = rates[-1] / max(rates)
        if steps > 1 and last > DECAYED:
            raise UserError(
                f"arm {arm!r}: schedule={config.schedule.name} ends at {last:.0%} of its highest "
                f"rate after {steps:,} steps; losses of runs that are not decayed cannot be "
                f"compared (allowed: {DECAYED:.0%}). Use cosine, linear, or wsd with a decay, and "
                f"a lower final."
            )
