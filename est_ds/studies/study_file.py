"""The study file: what is compared with what, by which seeds, at which budgets."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from est_ds.config.kinds import PathText
from est_ds.config.run_file import SECTIONS, expanded, in_effect
from est_ds.config.sections import Seed
from est_ds.config.strict import Strict, checked
from est_ds.config.yaml12 import read_mapping
from est_ds.errors import UserError, did_you_mean

Budget = Literal["tokens", "flops", "seconds"]
ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=60)]
Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]
Values = tuple[tuple[str, str], ...]  # of fields, as JSON, in the order of the grid

PATHS = ("study_dir", "base", "results")
# Fields of a run that the study sets itself, or that say nothing about training.
TAKEN = ("run_dir", "seed", "seeds", "resume")
DEFAULTS = (
    "checkpoint.keep_last=1",
    "checkpoint.keep_best=false",
    "evaluate.windows=true",
    "evaluate.boundaries=true",
    "log.step_times=false",  # the study measures the arms in turns
)


def _listed_once(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and len(set(value)) < len(value):
        raise ValueError("has a value twice; list it once")
    return value


class SeedLists(Strict):
    """Seeds of the parts of a run: one list, or a number that all have. The first seed of the study
    is made of the first of every list.

    Attributes:
        model: of the first weights.
        data: of the order of the sequences, and what the objective draws of them.
        method: of the plans, and the masks of dropout.
    """

    model: list[Seed] | Seed
    data: list[Seed] | Seed
    method: list[Seed] | Seed

    @model_validator(mode="after")
    def _equally_long(self) -> SeedLists:
        lengths = {len(v) for v in (self.model, self.data, self.method) if isinstance(v, list)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                "model, data and method need lists of one length, at least one of them; a single "
                "number is the same for all"
            )
        return self

    @property
    def count(self) -> int:
        return max(len(v) for v in (self.model, self.data, self.method) if isinstance(v, list))


class StudyEvaluate(Strict):
    """What every finished run is asked beside its held-out loss.

    Attributes:
        tasks: est_ds' own, of the held-out text (`score.words`).
        limit: places in the text that are asked about; None: all of them.
    """

    tasks: Annotated[tuple[Literal["next_word", "cloze"], ...], Field(min_length=1)]
    limit: Annotated[int, Field(ge=1)] | None = None

    @field_validator("tasks")
    @classmethod
    def _no_task_twice(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return _listed_once(tasks)


class Study(Strict):
    """What `est-ds compare` reads.

    Attributes:
        study_dir: folder of the runs, `STUDY_DIR/ARM/seed_S...`.
        base: a run file, relative to the study file.
        set: fields of all runs, dotted or in sections.
        baseline: the arm that the others are compared with.
        arms: by name, what an arm changes of `base`. A section with a `name` (method, schedule,
            objective) is replaced as a whole; of others the fields. Files are relative to the study
            file. `tune` in an arm takes the place of the study's.
        seeds: of weights, data and draws at once, or of each by itself.
        tune: values by field, which every arm tries on the first seed; the best by held-out loss is
            that of the other seeds.
        budgets: what is made equal: the tokens, the FLOPs, the seconds. The last one listed gives
            the verdict.
        screen: nats. An arm that on the first seed is further behind the baseline, at the budget
            that gives the verdict, trains no other seed and has no verdict.
        dense_curve: budgets of further baseline runs, as fractions of its steps, each trained to
            the end of its own schedule: what the gain in compute is read from.
        intervals: false for a pilot with one seed, which shows no interval and no verdict.
        evaluate: tasks that finished runs are asked before their checkpoints go.
        keep_checkpoints: of finished runs, for export and branches.
        results: file of the results (default: `STUDY_DIR/results.jsonl`), relative to the study
            file.
    """

    study_dir: PathText
    base: PathText
    set: dict[str, Any] = {}
    baseline: str
    arms: Annotated[dict[ArmName, dict[str, Any]], Field(min_length=1)]
    seeds: Annotated[
        Annotated[list[Seed], Field(min_length=1), Tag("<list>")]
        | Annotated[SeedLists, Tag("<lists>")],
        Discriminator(lambda value: "<lists>" if isinstance(value, dict) else "<list>"),
    ] = [0, 1, 2]
    tune: Grid = {}
    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)] = ("tokens", "flops")
    screen: Annotated[float, Field(gt=0.0)] | None = None
    dense_curve: tuple[Annotated[float, Field(gt=0.0, le=10.0)], ...] = ()
    intervals: bool = True
    evaluate: StudyEvaluate | None = None
    keep_checkpoints: bool = False
    results: PathText | None = None

    @field_validator("seeds", "budgets", "dense_curve")
    @classmethod
    def _no_value_twice(cls, value: Any) -> Any:
        return _listed_once(value)

    @model_validator(mode="after")
    def _fits(self) -> Study:
        if self.baseline not in self.arms:
            near = did_you_mean(self.baseline, self.arms)
            raise ValueError(
                f"baseline={self.baseline!r} is not among the arms; {near}use one of "
                f"{', '.join(self.arms)}"
            )
        if self.intervals and self.seed_count == 1:
            raise ValueError(
                "seeds has one seed, which gives no interval; list two or more (three are usual), "
                "or set intervals=false for a pilot"
            )
        if not self.intervals and self.seed_count > 1:
            raise ValueError("intervals=false has no effect with several seeds; remove it")
        if self.screen is not None and self.seed_count == 1:
            raise ValueError(
                "screen has no effect with one seed; remove it, or list two or more seeds"
            )
        return self

    @property
    def seed_count(self) -> int:
        return self.seeds.count if isinstance(self.seeds, SeedLists) else len(self.seeds)


@dataclass(frozen=True)
class Arm:
    """An arm of a study.

    Attributes:
        overrides: what it changes of the base, as the command line writes it.
        grid: the values that it tries on the first seed, in order; one empty one without `tune`.
    """

    name: str
    overrides: tuple[str, ...]
    grid: tuple[Values, ...]


@dataclass(frozen=True)
class StudyFile:
    """A study file read: paths are those that this process can open."""

    file: Path
    study: Study
    base: Path
    arms: dict[str, Arm]
    seeds: dict[int, tuple[str, ...]]  # overrides by seed

    @property
    def folder(self) -> Path:
        return Path(self.study.study_dir)

    @property
    def results(self) -> Path:
        if self.study.results is None:
            return self.folder / "results.jsonl"
        return self.file.parent / self.study.results

    @property
    def baseline(self) -> Arm:
        return self.arms[self.study.baseline]

    def with_seeds(self, seeds: set[int]) -> StudyFile:
        """The same with these seeds besides its own."""
        added = {seed: _seed(self.study.seeds, seed) for seed in sorted(seeds - self.seeds.keys())}
        return StudyFile(self.file, self.study, self.base, self.arms, self.seeds | added)


def load_study(path: str | os.PathLike) -> StudyFile:
    """Reads a study file.

    Raises:
        UserError: it is missing or no YAML mapping, or a field is wrong.
    """
    file = Path(path)
    tree = expanded(read_mapping(file, "study file"), PATHS)
    if "run_dir" in tree and not {"study_dir", "arms"} & tree.keys():
        raise UserError(
            f"study file {str(file)!r} is a run file (it has run_dir, and no study_dir nor arms); "
            f"give a study file: configs/study has some."
        )
    study = checked(Study, tree)
    base = file.parent / study.base
    if not base.exists():
        raise UserError(f"base={study.base!r}: {base} does not exist; name a run file or a run.")
    common = _overrides(study.set, file.parent, "set")
    arms = {name: _arm(study, name, file.parent, common) for name in study.arms}
    listed = range(study.seeds.count) if isinstance(study.seeds, SeedLists) else study.seeds
    seeds = {seed: _seed(study.seeds, seed) for seed in listed}
    return StudyFile(file, study, base, arms, seeds)


def _seed(seeds: list[int] | SeedLists, seed: int) -> tuple[str, ...]:
    """Overrides of a seed; of one after the lists every part has the next numbers."""
    if not isinstance(seeds, SeedLists):
        return (f"seed={seed}",)
    parts = {}
    for name in ("model", "data", "method"):
        value = getattr(seeds, name)
        if isinstance(value, list):
            beyond = seed - len(value)
            value = value[seed] if beyond < 0 else max(value) + 1 + beyond
        parts[name] = value
    return tuple(f"seeds.{name}={value}" for name, value in parts.items())


def _arm(study: Study, name: str, folder: Path, common: tuple[str, ...]) -> Arm:
    section = dict(study.arms[name])
    grid = study.tune
    if "tune" in section:
        own = section.pop("tune")
        if not isinstance(own, dict) or not all(isinstance(v, list) and v for v in own.values()):
            raise UserError(
                f"arms.{name}.tune={own!r}: write fields with lists of values, such as "
                f"{{optimizer.lr: [1.e-3, 2.e-3]}}."
            )
        grid = own
    overrides = _overrides(section, folder, f"arms.{name}")
    for field, tried in grid.items():
        if field in ("steps", "tokens"):
            raise UserError(
                f"arms.{name}: tune has {field}, of which the largest would always be chosen; see "
                f"dense_curve, or make arms of them."
            )
        if len({_text(value) for value in tried}) < len(tried):
            raise UserError(f"arms.{name}: tune has a value of {field} twice; list it once.")
        _refuse_taken(field, f"arms.{name}.tune" if "tune" in study.arms[name] else "tune")
        for override in (*common, *overrides):
            if override.partition("=")[0] == field:
                where = f"arms.{name}" if override in overrides else "set"
                raise UserError(
                    f"{where}: {override} cannot take effect, since tune has {field}; remove "
                    f"one of them, or give the arm a tune of its own (tune: {{}} for none)."
                )
    texts = [[_text(value) for value in values] for values in grid.values()]
    values = tuple(tuple(zip(grid, combination)) for combination in product(*texts))
    return Arm(name, (*common, *overrides), values)


def _overrides(section: dict[str, Any], folder: Path, where: str) -> tuple[str, ...]:
    """Sections and fields as overrides of the base; see `Study.arms`."""
    found = []
    for key, value in section.items():
        _refuse_taken(key, where)
        if key in SECTIONS and isinstance(value, str):
            value = str(folder / expanded(value, (key,), key))
        if isinstance(value, dict) and "name" not in value:
            inner = {f"{key}.{field}": part for field, part in value.items()}
            found += _overrides(inner, folder, where)
        else:
            found.append(f"{key}={_text(value)}")
    return tuple(in_effect(found))


def _text(value: Any) -> str:
    """A value as YAML on one line, which JSON is."""
    return json.dumps(value)


def _refuse_taken(field: str, where: str) -> None:
    if field.partition(".")[0] in TAKEN:
        raise UserError(
            f"{where}: {field} cannot be set, since the study gives every run its own; remove it "
            f"(seeds stand under `seeds`, folders under `study_dir`)."
        )


def override_texts(values: Values) -> tuple[str, ...]:
    """Chosen values as overrides."""
    return tuple(f"{field}={value}" for field, value in values)
