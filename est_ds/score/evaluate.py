"""`est-ds eval`: what a checkpoint scores on held-out text and in tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from est_ds.config.run_config import RunConfig
from est_ds.data.encoders import load_encoder
from est_ds.design import make_design
from est_ds.errors import UserError
from est_ds.export.loss import where_there_is_room
from est_ds.ranks.versions import versions
from est_ds.run.scores import Evaluation, Figure, TaskScore, add_evaluation, check_evaluations
from est_ds.score import words
from est_ds.score.harness import Asked, Tasks, harness_scores, load_tasks
from est_ds.score.held_out import held_out_losses, mean_of
from est_ds.score.likelihood import Scorer
from est_ds.score.source import Source, exported


@dataclass(frozen=True)
class Wish:
    """What to evaluate.

    Attributes:
        checkpoint: `latest`, `best`, or a number of steps.
        tasks: est_ds' own, or lm-eval's.
        include: folder with more tasks of lm-eval.
        limit: examples of each task; None: all.
        shots: examples that lm-eval shows before each; None: as the task says.
    """

    checkpoint: str
    tasks: tuple[str, ...] = ()
    include: Path | None = None
    limit: int | None = None
    shots: int | None = None

    @property
    def own(self) -> tuple[str, ...]:
        return tuple(name for name in self.tasks if name in words.TASKS)

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(name for name in self.tasks if name not in words.TASKS)


def evaluate_run(config: RunConfig, wish: Wish) -> tuple[Evaluation, str]:
    """Evaluates a checkpoint of a run directory, and writes `eval.json` there.

    Returns:
        What the file says of that step, and which folder the model came from.

    Raises:
        UserError: as `exported`; or a task is not known, or does not fit the model.
        Failure: a held-out loss is no number.
    """
    head = make_design(config).family.auto_class
    _check(wish, head)
    tasks = None
    if wish.others:
        tasks = load_tasks(Asked(wish.others, wish.include, wish.limit, wish.shots))
    with exported(config, wish.checkpoint) as source:
        check_evaluations(source.run_dir)
        model = source.model()
        losses = held_out_losses(source, model)

        def scores() -> dict[str, TaskScore]:
            return _own_scores(source, model, wish) | _other_scores(source, model, tasks)

        found = Evaluation(
            step=source.step,
            held_out=losses,
            mean=mean_of(losses),
            tasks=where_there_is_room(model, scores),
            versions=versions(),
        )
        return add_evaluation(source.run_dir, found), source.where


def score_tasks(config: RunConfig, wish: Wish) -> dict[str, TaskScore]:
    """Asks a checkpoint est_ds' own tasks alone, and writes nothing.

    Raises:
        UserError: as `exported`; or the held-out text has too few words.
    """
    with exported(config, wish.checkpoint) as source:
        model = source.model()
        return where_there_is_room(model, lambda: _own_scores(source, model, wish))


def check_tasks(tasks: tuple[str, ...], head: str, field: str) -> None:
    """Checks whether a model can be asked tasks.

    Args:
        head: of transformers, as `AutoModelForCausalLM`.
        field: that names them, for errors.

    Raises:
        UserError: it cannot.
    """
    is_causal, is_masked = head == "AutoModelForCausalLM", head == "AutoModelForMaskedLM"
    unfit = [n for n in tasks if not (is_causal or (is_masked and n == words.CLOZE))]
    if unfit:
        allowed = f"{words.CLOZE} alone" if is_masked else "no task"
        raise UserError(
            f"{field}={','.join(unfit)} asks a model that predicts the next token, and this run "
            f"trains {head}, of which {allowed} can be asked; leave it out."
        )


def _check(wish: Wish, head: str) -> None:
    """Checks what is asked.

    Raises:
        UserError: the model cannot be asked it, or an option has no effect.
    """
    check_tasks(wish.tasks, head, "--tasks")
    for name in ("include", "shots"):
        if getattr(wish, name) is not None and not wish.others:
            raise UserError(
                f"--{name}={getattr(wish, name)} has no effect without a task of lm-eval; name one "
                f"in --tasks, or remove it."
            )
    if wish.limit is not None and not wish.tasks:
        raise UserError(
            f"--limit={wish.limit} has no effect without --tasks; name tasks, or remove it "
            f"(evaluate.sequences=N is the number of held-out windows)."
        )


def _own_scores(source: Source, model: nn.Module, wish: Wish) -> dict[str, TaskScore]:
    if not wish.own:
        return {}
    tokenizer = source.tokenizer()
    positions = source.design.family.shape(source.design.hf_config).sequence
    scorer = Scorer(model, tokenizer, positions)
    corpora = [held.corpus for held in source.windows.values()]
    encoder = load_encoder(source.config.data.tokenizer)
    count = wish.limit or words.ITEMS
    items = words.make_items(corpora, encoder, scorer, source.config.data.sequence, count)
    masked = source.design.family.auto_class == "AutoModelForMaskedLM"
    settings = {"limit": wish.limit, "corpora": [corpus.fingerprint for corpus in corpora]}
    found = {}
    for name in wish.own:
        right = words.correct(items, name, scorer, masked)
        error = right.std(ddof=1) / len(right) ** 0.5 if len(right) > 1 else None
        figure = Figure(value=right.mean(), error=error)
        found[name] = TaskScore(
            by="est_ds",
            metrics={"acc": figure},
            examples=len(right),
            chance=1 / words.CHOICES,
            settings=settings,
        )
    return found


@torch.no_grad()
def _other_scores(source: Source, model: nn.Module, tasks: Tasks | None) -> dict[str, TaskScore]:
    if tasks is None:
        return {}
    return harness_scores(tasks, model, source.tokenizer(), source.config.batch.micro)
