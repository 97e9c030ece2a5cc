"""Tables of what the checkpoints of a run score, for the console and the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import stdev

from est_ds.run.scores import CorpusLoss, Evaluation, FineTuning

HELD_OUT_HEADS = (
    "step",
    "held-out corpus",
    "nats per token",
    "bits per byte",
    "perplexity",
    "windows",
)
TASK_HEADS = ("step", "task", "metric", "score", "guessing", "examples")
TUNING_HEADS = ("step", "task", "metric", "learning rate", "mean", "spread", "seeds", "guessing")
ERRORS = "After ± stands the standard error: over windows, or over the examples of a task."
SPREAD = (
    "Spread is the standard deviation over seeds (weights of the head, order of the examples). The "
    "learning rate with the best mean is marked *: it was chosen on the same examples."
)


def held_out_rows(evaluations: Iterable[Evaluation]) -> list[tuple[str, ...]]:
    """Rows of `HELD_OUT_HEADS`."""
    rows = []
    for evaluation in evaluations:
        for name, loss in evaluation.held_out.items():
            rows.append((f"{evaluation.step:,}", name, *_loss_cells(loss)))
        if evaluation.mean is not None:
            rows.append((f"{evaluation.step:,}", "mean", str(evaluation.mean), "", "", ""))
    return rows


def task_rows(evaluations: Iterable[Evaluation]) -> list[tuple[str, ...]]:
    """Rows of `TASK_HEADS`."""
    return [
        (
            f"{evaluation.step:,}",
            name,
            metric,
            str(figure),
            "" if score.chance is None else f"{score.chance:.4f}",
            "" if score.examples is None else f"{score.examples:,}",
        )
        for evaluation in evaluations
        for name, score in evaluation.tasks.items()
        for metric, figure in score.metrics.items()
    ]


def tuning_rows(fine_tunings: Iterable[FineTuning]) -> list[tuple[str, ...]]:
    """Rows of `TUNING_HEADS`: one for each learning rate."""
    return [
        (
            f"{tuned.step:,}",
            tuned.task,
            tuned.metric,
            f"{lr:.3g}" + (" *" if lr == tuned.best_lr else ""),
            f"{sum(values) / len(values):.4f}",
            f"{stdev(values):.4f}" if len(values) > 1 else "",
            str(len(values)),
            "" if tuned.guess is None else f"{tuned.guess:.4f}",
        )
        for tuned in fine_tunings
        for lr, values in tuned.by_lr.items()
    ]


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, columns two spaces apart."""
    lines = [heads, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    padded = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def _loss_cells(loss: CorpusLoss) -> tuple[str, ...]:
    bits = "" if loss.bits_per_byte is None else str(loss.bits_per_byte)
    return str(loss.nats), bits, str(loss.perplexity), f"{loss.windows:,}"
