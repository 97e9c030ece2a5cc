"""Held-out loss of the arms against what they score in tasks (`evaluate.tasks`): does the arm of
lower loss also score higher?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from est_ds.studies.answers import Answers
from est_ds.studies.arms import ArmAnswer
from est_ds.studies.statistics import RankCorrelation, rank_correlation


@dataclass(frozen=True)
class Place:
    """Where an arm stands.

    Attributes:
        losses: held-out, nats a token, by the seeds of which the score is known too.
        scores: share of right answers, by the same seeds.
    """

    arm: str
    losses: dict[int, float]
    scores: dict[int, float]

    @property
    def loss(self) -> float:
        return fmean(self.losses.values())

    @property
    def score(self) -> float:
        return fmean(self.scores.values())

    @property
    def spreads(self) -> tuple[float, float] | None:
        """Standard deviations over the seeds, of loss and score; None of one seed."""
        if len(self.losses) < 2:
            return None
        return stdev(self.losses.values()), stdev(self.scores.values())


@dataclass(frozen=True)
class Downstream:
    """The arms in one task.

    Attributes:
        places: arms with a run whose loss and score are known, the baseline first.
        correlation: of the arms' mean losses with their mean scores; None of too few arms, or
            where all are equal.
    """

    places: tuple[Place, ...]
    correlation: RankCorrelation | None


def downstream(answers: Answers) -> dict[str, Downstream]:
    """The arms' losses and scores by task; empty where a study asks none."""
    tasks = dict.fromkeys(task for arm in answers.arms for task in arm.tasks)
    found = {}
    for task in tasks:
        places = [place for arm in answers.arms if (place := _place(arm, task))]
        correlation = rank_correlation([p.loss for p in places], [p.score for p in places])
        found[task] = Downstream(tuple(places), correlation)
    return found


def _place(arm: ArmAnswer, task: str) -> Place | None:
    answer = arm.tasks.get(task)
    seeds = [s for s in answer.scores if s in arm.losses] if answer else []
    if answer is None or not seeds:
        return None
    of = ({s: values[s] for s in seeds} for values in (arm.losses, answer.scores))
    return Place(arm.name, *of)


def downstream_texts(found: dict[str, Downstream]) -> list[str]:
    """A sentence for each task."""
    return [downstream_text(task, each) for task, each in found.items()]


def downstream_text(task: str, found: Downstream) -> str:
    """What the correlation in a task says."""
    number, correlation = len(found.places), found.correlation
    if correlation is None:
        return (
            f"{task} against held-out loss: no rank correlation of {_arms(found.places)} (it takes "
            f"four, of different losses and scores)."
        )
    ends = ""
    if correlation.low is not None and correlation.high is not None:
        ends = f" [{correlation.low:+.2f}, {correlation.high:+.2f}]"
    p = f"p {'<= ' if correlation.is_least else ''}{correlation.p:.2g}"
    return (
        f"{task} against held-out loss: Spearman's rank correlation of {number} arms is "
        f"{correlation.value:+.2f}{ends}, {p} (-1: the lower an arm's loss, the higher "
        f"its score)."
    )


def _arms(places: Sequence[Place]) -> str:
    return "1 arm" if len(places) == 1 else f"{len(places)} arms"
