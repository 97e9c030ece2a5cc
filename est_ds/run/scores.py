"""`eval.json` and `finetune.json`: what the checkpoints of a run score, after training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from est_ds.disk import replace_text, try_to_write
from est_ds.errors import UserError

EVALUATIONS, FINE_TUNINGS = "eval.json", "finetune.json"


class Part(BaseModel):
    """A part of a file; unknown keys are refused: another version wrote them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Figure(Part):
    """A number, and its standard error where that is known; None is no number."""

    value: float | None
    error: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "no number"
        return f"{self.value:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


class CorpusLoss(Part):
    """A held-out loss.

    Attributes:
        nats: per target.
        bits_per_byte: of text; None where the bytes are not known or not all are predicted.
        perplexity: e to the nats.
        windows: that were evaluated.
        targets: in these.
        reported: what the run reported at this step of the same windows; None if it did not.
    """

    nats: Figure
    bits_per_byte: Figure | None
    perplexity: Figure
    windows: int
    targets: int
    reported: float | None = None


class TaskScore(Part):
    """What a model scores in a task.

    Attributes:
        by: what computed it: `est_ds`, or `lm_eval` with its version.
        metrics: by name, as `acc`.
        examples: how many there were.
        chance: the accuracy of guessing, where it is known.
        settings: what else the score depends on.
    """

    by: str
    metrics: dict[str, Figure]
    examples: int | None
    chance: float | None = None
    settings: dict[str, Any] = {}


class Evaluation(Part):
    """What a checkpoint scores.

    Attributes:
        step: optimizer steps that it was trained.
        held_out: by the name of the corpus.
        mean: of the corpora; None where there is one.
        tasks: by name.
        versions: of the libraries that computed it last.
    """

    step: int
    held_out: dict[str, CorpusLoss]
    mean: Figure | None
    tasks: dict[str, TaskScore]
    versions: dict[str, str]

    def over(self, former: Evaluation | None) -> Evaluation:
        """Returns this evaluation, with those tasks of a former one that it has not."""
        tasks = {} if former is None else former.tasks
        return self.model_copy(update={"tasks": tasks | self.tasks})


class TunedModel(Part):
    """One fine-tuned model: its learning rate, its seed, its metrics on the development set."""

    lr: float
    seed: int
    metrics: dict[str, float]


class FineTuning(Part):
    """Fine-tuned models of one checkpoint and task.

    Attributes:
        step: optimizer steps that the checkpoint was pretrained.
        task: its name.
        metric: by which learning rates are compared.
        models: one for each learning rate and seed.
        guess: the metric of the answer that is most frequent in the training set; None of a metric
            for which that says nothing.
        examples: of the training set and of the development set.
        settings: what else the metrics depend on.
        versions: of the libraries.
    """

    step: int
    task: str
    metric: str
    models: tuple[TunedModel, ...] = Field(min_length=1)
    guess: float | None
    examples: tuple[int, int]
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def by_lr(self) -> dict[float, list[float]]:
        """The metric of every seed, by learning rate."""
        found: dict[float, list[float]] = {}
        for model in self.models:
            found.setdefault(model.lr, []).append(model.metrics[self.metric])
        return found

    @property
    def best_lr(self) -> float:
        """The learning rate with the best mean over the seeds; of equal ones the smallest."""
        means = {lr: sum(values) / len(values) for lr, values in self.by_lr.items()}
        return min(means, key=lambda lr: (-means[lr], lr))


class Evaluations(Part):
    """Contents of `eval.json`: evaluations, by step."""

    evaluations: tuple[Evaluation, ...] = ()


class FineTunings(Part):
    """Contents of `finetune.json`: one for each step and task."""

    fine_tunings: tuple[FineTuning, ...] = ()


Contents = TypeVar("Contents", Evaluations, FineTunings)


def read_evaluations(run_dir: Path) -> tuple[Evaluation, ...]:
    """Reads `eval.json`; none where it is not there.

    Raises:
        UserError: it is not what was written.
    """
    return _read(run_dir / EVALUATIONS, Evaluations).evaluations


def read_fine_tunings(run_dir: Path) -> tuple[FineTuning, ...]:
    """Reads `finetune.json`; none where it is not there.

    Raises:
        UserError: it is not what was written.
    """
    return _read(run_dir / FINE_TUNINGS, FineTunings).fine_tunings


def check_evaluations(run_dir: Path) -> None:
    """Checks, before anything is computed, whether an evaluation can be added.

    Raises:
        UserError: it cannot.
    """
    read_evaluations(run_dir)
    _check_writable(run_dir / EVALUATIONS)


def check_fine_tunings(run_dir: Path) -> None:
    """Checks, before anything is trained, whether a fine-tuning can be added.

    Raises:
        UserError: it cannot.
    """
    read_fine_tunings(run_dir)
    _check_writable(run_dir / FINE_TUNINGS)


def add_evaluation(run_dir: Path, new: Evaluation) -> Evaluation:
    """Writes an evaluation beside those of other steps; of its own step other tasks are kept.

    Returns:
        What the file now says of that step.
    """
    former = {e.step: e for e in read_evaluations(run_dir)}
    new = new.over(former.get(new.step))
    kept = _by(former | {new.step: new})
    _write(run_dir / EVALUATIONS, Evaluations(evaluations=kept))
    return new


def add_fine_tuning(run_dir: Path, new: FineTuning) -> None:
    """Writes a fine-tuning in place of a former one of the same step and task."""
    former = {(f.step, f.task): f for f in read_fine_tunings(run_dir)}
    kept = _by(former | {(new.step, new.task): new})
    _write(run_dir / FINE_TUNINGS, FineTunings(fine_tunings=kept))


def _by(keyed: dict) -> tuple:
    return tuple(keyed[key] for key in sorted(keyed))


def _read(file: Path, kind: Callable[..., Contents]) -> Contents:
    try:
        return kind.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return kind()
    except (OSError, ValidationError) as e:
        reason = e.strerror if isinstance(e, OSError) else e.errors()[0]["msg"]
        raise UserError(
            f"{file} cannot be read ({reason}); another version wrote it, or it was changed: move "
            f"it away, and evaluate or fine-tune again."
        ) from None


def _check_writable(file: Path) -> None:
    try:
        try_to_write(file.parent)
    except OSError as e:
        raise _unwritable(file, e) from None


def _write(file: Path, contents: Part) -> None:
    try:
        replace_text(file, contents.model_dump_json(indent=1) + "\n")
    except OSError as e:
        raise _unwritable(file, e) from None


def _unwritable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file} cannot be written ({error.strerror}); mend that.")
