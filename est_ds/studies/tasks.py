"""`evaluate` of a study: tasks that every finished run is asked, and what the arms score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from est_ds.checkpoints.store import LATEST
from est_ds.run.scores import TaskScore
from est_ds.score.evaluate import Wish, check_tasks, score_tasks
from est_ds.studies.results import RunResult
from est_ds.studies.runs import Runs, StudyRun
from est_ds.studies.statistics import Interval, t_interval
from est_ds.studies.study_file import StudyEvaluate


@dataclass(frozen=True)
class TaskAnswer:
    """What the runs of an arm score in a task.

    Attributes:
        scores: share of right answers by seed.
        mean: over the seeds, with its 95 % interval.
        spread: standard deviation over the seeds; None of one.
        chance: the share that guessing gets right.
    """

    scores: dict[int, float]
    mean: Interval
    spread: float | None
    chance: float | None


def check_evaluate(runs: Runs) -> None:
    """Checks whether the models of all arms can be asked the tasks.

    Raises:
        UserError: one cannot.
    """
    if asked := runs.file.study.evaluate:
        for arm in runs.file.arms.values():
            head = runs.design(arm.name, arm.grid[0]).family.auto_class
            check_tasks(asked.tasks, head, "evaluate.tasks")


def scores_of(run: StudyRun, asked: StudyEvaluate) -> dict[str, TaskScore]:
    """Asks the last checkpoint of a run.

    Raises:
        UserError: there is none, or the held-out text has too few words.
    """
    return score_tasks(run.config, Wish(LATEST, asked.tasks, limit=asked.limit))


def task_answers(
    asked: StudyEvaluate | None, results: Mapping[int, RunResult]
) -> dict[str, TaskAnswer]:
    """What an arm scores, by task.

    Args:
        results: of the arm's runs, by seed.
    """
    found = {}
    for task in asked.tasks if asked else ():
        known = {seed: s for seed, r in results.items() if (s := _score(r, task, asked))}
        if known:
            scores = {seed: _right(score) for seed, score in known.items()}
            values = list(scores.values())
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            chance = next(iter(known.values())).chance
            found[task] = TaskAnswer(scores, t_interval(values), spread, chance)
    return found


def unasked(asked: StudyEvaluate | None, results: Iterable[RunResult]) -> list[str]:
    """Warns of runs that are done and have no score of a task."""
    done = [result for result in results if result.loss is not None]
    lacking = [r for r in done if asked and not all(_score(r, t, asked) for t in asked.tasks)]
    if not lacking:
        return []
    return [
        f"{len(lacking)} runs were done before the study asked these tasks (evaluate), and have no "
        f"score of them; `est-ds compare` trains them again if their lines are taken out of its "
        f"results"
    ]


def score_of(result: RunResult, task: str, asked: StudyEvaluate) -> float | None:
    """The share of right answers of a run in a task; None if it was not asked it so."""
    score = _score(result, task, asked)
    return None if score is None else _right(score)


def _right(score: TaskScore) -> float:
    return float(score.metrics["acc"].value)


def _score(result: RunResult, task: str, asked: StudyEvaluate) -> TaskScore | None:
    """What a run scored in a task as it is asked now; None if it was not, or on other places."""
    score = result.tasks.get(task)
    return score if score and score.settings.get("limit") == asked.limit else None
