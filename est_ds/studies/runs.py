"""The runs of a study: which there are, what each costs, and what makes one the same as another."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from est_ds.config.run_config import RunConfig
from est_ds.config.run_file import load_run
from est_ds.cost.flops import Flops, dense_flops, saved
from est_ds.cost.parameters import total_parameters
from est_ds.data.indexed import Corpus
from est_ds.design import Design, make_design
from est_ds.errors import UserError
from est_ds.run.directory import fixed_fields
from est_ds.studies.study_file import DEFAULTS, Arm, StudyFile, Values, override_texts

# Budgets of FLOPs and seconds are all of the baseline's steps or multiples of a 200th, so that arms
# of nearly equal cost are compared with the same runs: at most a quarter of a percent off.
GRAIN = 200
# What a held-out loss depends on, beside the fields that a run never changes.
OF_EVALUATION = ("sequences", "choice")


@dataclass(frozen=True)
class StudyRun:
    """One training of a study.

    Attributes:
        values: of the fields that are tuned.
        flops: of the whole run, as its method expects them.
        key: names what is trained; the same for the same run in any folder and on any machine.
        name: its folder within the study's.
    """

    arm: str
    seed: int
    values: Values
    config: RunConfig
    flops: Flops
    key: str
    name: str

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of its result before it is trained."""
        return {
            "run": self.key,
            "arm": self.arm,
            "seed": self.seed,
            "values": dict(self.values),
            "steps": self.steps,
            "tokens": self.tokens,
            "flops": self.flops.model,
            "blocks_flops": self.flops.blocks,
        }

    @property
    def steps(self) -> int:
        return self.config.steps

    @property
    def tokens(self) -> int:
        return self.steps * self.config.tokens_per_step


class Runs:
    """Makes the runs of a study."""

    def __init__(self, file: StudyFile) -> None:
        self.file = file
        self.run = cache(self._run)
        self._design = cache(self._make_design)
        self._flops = cache(self._flops_of)
        self._parameters = cache(self._parameters_of)
        self.timed_key = cache(self._timed_key)

    @property
    def first(self) -> StudyRun:
        """The baseline's, with the first seed and the first values of its grid."""
        baseline = self.file.baseline
        return self.run(baseline.name, next(iter(self.file.seeds)), baseline.grid[0])

    def _run(self, arm: str, seed: int, values: Values, steps: int | None = None) -> StudyRun:
        """A run of an arm.

        Args:
            steps: None: what the study says.

        Raises:
            UserError: its fields do not fit; the message begins with the arm.
        """
        config = self._config(arm, values, steps, self.file.seeds[seed])
        name = _name(arm, seed, values, steps)
        own: dict[str, Any] = {"run_dir": str(self.file.folder / name)}
        if there := config.checkpoint.copy_to:
            copies = {"copy_to": f"{there}/{name}"}
            own["checkpoint"] = config.checkpoint.model_copy(update=copies)
        config = config.model_copy(update=own)
        flops = self._flops(arm, values, steps)
        return StudyRun(arm, seed, values, config, flops, key_of(config), name)

    def parameters(self, run: StudyRun) -> int:
        """Parameters of a run's model."""
        return self._parameters(run.arm, run.values)

    def _parameters_of(self, arm: str, values: Values) -> int:
        return total_parameters(self.design(arm, values).facts.pieces)

    def design(self, arm: str, values: Values, steps: int | None = None) -> Design:
        """The design of an arm, for any seed.

        Raises:
            UserError: its fields do not fit.
        """
        return self._design(arm, values, steps)

    def _make_design(self, arm: str, values: Values, steps: int | None) -> Design:
        config = self._config(arm, values, steps, ())
        try:
            return make_design(config)
        except UserError as e:
            raise UserError(f"arm {arm!r}: {e}") from None

    def _flops_of(self, arm: str, values: Values, steps: int | None) -> Flops:
        design = self.design(arm, values, steps)
        lengths = {
            "sequence": design.config.data.sequence,
            "target_sequence": design.target_sequence,
        }
        part, steps = saved(design.method, **lengths), design.config.steps
        size = design.flops_size(design.config.batch.global_)
        dense = dense_flops(design.method.shape, **size)
        return Flops(
            steps * dense.blocks * (1 - part.blocks), steps * dense.model * (1 - part.model)
        )

    def _timed_key(self, arm: str) -> str:
        """Names what is timed of an arm: its run without a seed, with the first values of its grid
        (`check_study` refuses grids that change the time of a step)."""
        return key_of(self._config(arm, self.file.arms[arm].grid[0], None, ()))

    def overrides(self, arm: str, values: Values, steps: int | None = None) -> list[str]:
        """What an arm changes of the base, but for its seed."""
        own = [*self.file.arms[arm].overrides, *override_texts(values)]
        if steps is not None:
            own = [text for text in own if not text.startswith("tokens=")] + [f"steps={steps}"]
        return [
            *DEFAULTS,
            *own,
            # Some folder: `evaluate.choice` of a run file depends on whether it has begun.
            f"run_dir={self.file.folder / 'unbegun'}",
        ]

    def _config(
        self, arm: str, values: Values, steps: int | None, seed: tuple[str, ...]
    ) -> RunConfig:
        try:
            return load_run(self.file.base, [*self.overrides(arm, values, steps), *seed])
        except UserError as e:
            raise UserError(f"arm {arm!r}: {e}") from None


def _name(arm: str, seed: int, values: Values, steps: int | None) -> str:
    parts = [f"seed_{seed}", *(f"{field}_{_short(value)}" for field, value in values)]
    if steps is not None:
        parts.append(f"steps_{steps}")
    return f"{arm}/{'_'.join(parts)}"


def _short(value: str) -> str:
    """A value in the name of a folder."""
    if re.fullmatch(r"[\w.+-]{1,40}", value):
        return value
    return hashlib.sha256(value.encode()).hexdigest()[:8]


def key_of(config: RunConfig) -> str:
    """Names what a run trains and evaluates: 16 hex characters.

    Folders, layout and logging are left out. So are the corpora's paths, since their contents are
    those of the study (`results.Header`), and defaults, so that a later version, which has more
    fields, knows the run again.
    """
    fields = fixed_fields(config, defaults=False)
    evaluation = {name: getattr(config.evaluate, name) for name in OF_EVALUATION}
    text = json.dumps([fields, evaluation], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Wanted:
    """The runs that a study wants, as far as its results choose them.

    Attributes:
        runs: in the order in which they are to be trained, none twice.
        chosen: the tuned values of every arm; None while its grid is not finished.
        matched: steps of the baseline by arm and budget, where they are known.
        screened: how far arms that train no other seed are behind on the first one, in nats.
    """

    runs: tuple[StudyRun, ...]
    chosen: dict[str, Values | None]
    matched: dict[str, dict[str, int]]
    screened: dict[str, float]

    @cached_property
    def by_key(self) -> dict[str, StudyRun]:
        return {run.key: run for run in self.runs}


class Chooser:
    """What the runs depend on that only results can say.

    Args:
        losses: held-out loss by key of the runs that are done; infinite of those that diverged.
        time_ratios: step time of an arm over the baseline's.
        guess: takes the first values of a grid that is not finished, to count what will come.
    """

    def __init__(
        self, losses: Mapping[str, float], time_ratios: Mapping[str, float], guess: bool = False
    ) -> None:
        self.losses, self.time_ratios, self.guess = losses, time_ratios, guess

    def best(self, runs: Runs, arm: Arm) -> Values | None:
        """The values of an arm's grid with the lowest loss on the first seed."""
        if len(arm.grid) == 1:
            return arm.grid[0]
        first = next(iter(runs.file.seeds))
        keys = {values: runs.run(arm.name, first, values).key for values in arm.grid}
        if all(key in self.losses for key in keys.values()):
            return min(arm.grid, key=lambda values: self.losses[keys[values]])
        return arm.grid[0] if self.guess else None

    def behind(self, run: StudyRun, baseline: StudyRun) -> float | None:
        """Nats by which a run's loss is above the baseline's; None while one is not known."""
        here, there = self.losses.get(run.key), self.losses.get(baseline.key)
        if here is None or there is None or not math.isfinite(there):
            return None
        return here - there


def wanted_runs(runs: Runs, chooser: Chooser, only: str | None = None) -> Wanted:
    """Lists the runs of a study: seed by seed, the baseline before the others.

    Args:
        only: an arm, which is listed with what it needs of the baseline; None: all.

    Raises:
        UserError: the fields of one do not fit.
    """
    file, baseline = runs.file, runs.file.baseline
    first = next(iter(file.seeds))
    others = [arm for name, arm in file.arms.items() if only in (None, name)]
    arms = [baseline, *(arm for arm in others if arm is not baseline)]
    chosen = {arm.name: chooser.best(runs, arm) for arm in arms}
    grid = [runs.run(arm.name, first, values) for arm in arms for values in arm.grid]
    matched: dict[str, dict[str, int]] = {arm.name: {} for arm in arms}
    behind: dict[str, float | None] = {}
    curve: list[int] = []
    own = chosen[baseline.name]
    if own is not None:
        dense = runs.run(baseline.name, first, own)
        curve = [_grained(part * dense.steps, dense) for part in file.study.dense_curve]
        for arm in arms[1:]:
            if (values := chosen[arm.name]) is not None:
                run = runs.run(arm.name, first, values)
                matched[arm.name] = _matched(file, run, dense, chooser.time_ratios)
                at = matched[arm.name].get(file.study.budgets[-1])
                there = runs.run(baseline.name, first, own, at if at != dense.steps else None)
                behind[arm.name] = None if at is None else chooser.behind(run, there)
    screen = file.study.screen
    screened = {a: d for a, d in behind.items() if screen and d is not None and d > screen}
    # Those of whom the first seed does not tell yet wait, if the study screens.
    wait = {a for a, d in behind.items() if screen and d is None and not chooser.guess}
    listed = grid
    for seed in file.seeds:
        left_out = set() if seed == first else screened.keys() | wait
        for arm in arms:
            if arm.name not in left_out and (values := chosen[arm.name]) is not None:
                listed.append(runs.run(arm.name, seed, values))
        if own is not None:
            usual = runs.run(baseline.name, seed, own).steps
            by_budget = [n for arm, n in matched.items() if arm not in left_out]
            steps = {*curve, *(n for budgets in by_budget for n in budgets.values())} - {usual}
            listed += [runs.run(baseline.name, seed, own, n) for n in sorted(steps)]
    found: dict[str, StudyRun] = {}
    for run in listed:  # of two arms with the same config the first one trains it
        found.setdefault(run.key, run)
    return Wanted(tuple(found.values()), chosen, matched, screened)


def _matched(
    file: StudyFile, run: StudyRun, dense: StudyRun, time_ratios: Mapping[str, float]
) -> dict[str, int]:
    """Steps of the baseline that equal an arm's run, by budget."""
    found = {"tokens": round(run.tokens / dense.config.tokens_per_step)}
    found["flops"] = _grained(run.flops.model / (dense.flops.model / dense.steps), dense)
    if run.arm in time_ratios:
        found["seconds"] = _grained(run.steps * time_ratios[run.arm], dense)
    return {budget: found[budget] for budget in file.study.budgets if budget in found}


def _grained(steps: float, dense: StudyRun) -> int:
    grain = max(1, dense.steps // GRAIN)
    if abs(steps - dense.steps) <= grain / 2:
        return dense.steps
    return max(1, round(steps / grain) * grain)


def fingerprints(config: RunConfig) -> dict[str, str] | None:
    """What names the contents of the corpora; None where they are not on this machine.

    Raises:
        UserError: a corpus is there, and cannot be read.
    """
    data = config.data
    prefixes = {f"train.{i}": part.corpus for i, part in enumerate(data.parts)}
    prefixes |= {f"valid.{name}": prefix for name, prefix in data.held_out.items()}
    found = {}
    for name, prefix in prefixes.items():
        corpus = Corpus.described(prefix)
        if corpus is None:
            return None
        found[name] = corpus.fingerprint
    return found
