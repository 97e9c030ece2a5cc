"""The page of several runs: their curves over tokens, FLOPs and seconds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from est_ds.errors import UserError
from est_ds.report.curves import SHOWN, Line, curves_figure
from est_ds.report.figures import cumulative, running_median
from est_ds.report.files import RunFiles, read_run
from est_ds.report.frame import write_whole
from est_ds.report.interactive import (
    COSTS,
    Look,
    figure_html,
    look,
    page,
    warnings_html,
    wide_table,
)
from est_ds.report.summary import summary_of
from est_ds.report.text import seconds

# What a held-out loss is of.
LOSS_OF = (
    "data.valid",
    "data.tokenizer",
    "data.sequence",
    "objective",
    "evaluate.sequences",
    "evaluate.choice",
)
HEADS = ("run", "method", "steps", "tokens", "model FLOPs", "saved", "held-out loss", "step time")
HELD_OUT = (
    "The full model's held-out loss at every evaluation; of one that grows, as deep as it was then."
)
TRAINING = "Loss of each logged step's subnetwork, as a running median."
OVER = (
    "FLOPs and seconds are those of the training steps; a branch counts from where it began. "
    "Seconds are as logged: of runs that had other hardware, layouts or neighbours they say "
    f"nothing of the methods. {SHOWN}"
)
NO_VERDICT = (
    "One run of each says little: seeds differ, learning rates fit one better than another, and "
    "losses before the learning rate has decayed cannot be compared. `est-ds compare` does that."
)


def write_several(run_dirs: Sequence[str], out: str | os.PathLike) -> Path:
    """Writes one page of several run directories, finished or not, whole or not at all.

    Returns:
        The path of the page.

    Raises:
        UserError: one is given twice, is no run directory, its metrics are missing or incomplete,
            or the page cannot be written.
    """
    places = [Path(run_dir).resolve() for run_dir in run_dirs]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise UserError(f"run directory {run_dirs[i]!r} is given twice; give each run once.")
    file = Path(out)
    text = render([read_run(run_dir) for run_dir in run_dirs])
    write_whole(file, text, "choose another file (--out)")
    return file


def render(runs: Sequence[RunFiles]) -> str:
    """The page as text; well-formed XML too, scripts aside."""
    looks = [look(i - 1 if i else None) for i in range(len(runs))]
    held_out = [line for run, of in zip(runs, looks) if (line := _held_out(run, of))]
    training = [_training(run, of) for run, of in zip(runs, looks)]
    parts = [
        f"<h1>{len(runs)} runs</h1>",
        f'<p class="lead">{escape(NO_VERDICT)}</p>',
        wide_table(HEADS, [_cells(run) for run in runs]),
        warnings_html(_differ(runs)),
    ]
    for name, lines, caption in (
        ("Held-out", held_out, HELD_OUT),
        ("Training", training, TRAINING),
    ):
        if lines:
            figure = curves_figure(lines, list(COSTS), f"{name.lower()} loss, nats a token")
            html = figure_html(figure, name.lower(), f"{caption} {OVER}")
            parts += [f"<h2>{name} loss</h2>", html]
    return page(f"{len(runs)} runs: est_ds report", "\n".join(parts))


def _cells(run: RunFiles) -> list[str]:
    """A row of the table of runs."""
    summary = summary_of(run)
    return [
        str(run.directory),
        summary.method,
        f"{run.steps_done:,} of {run.config.steps:,}",
        f"{summary.tokens:,}",
        f"{cumulative(run, 'flops_active')[-1]:.4g}",
        f"{summary.saved_model:.1%}",
        "-" if summary.eval_loss is None else f"{summary.eval_loss:.4f}",
        seconds(float(np.median([entry["step_s"] for entry in run.steps]))),
    ]


def _line(run: RunFiles, of: Look, done: Sequence[int], losses: Sequence[float]) -> Line:
    """A curve at so many steps done."""
    first = run.config.first_step
    logged = [first, *(entry["step"] + 1 for entry in run.steps)]
    x = {"tokens": [(n - first) * run.tokens_per_step for n in done]}
    for cost, field in (("flops", "flops_active"), ("seconds", "step_s")):
        x[cost] = np.interp(done, logged, np.append(0, cumulative(run, field))).tolist()
    return Line(str(run.directory), "", of, x, list(losses))


def _held_out(run: RunFiles, of: Look) -> Line | None:
    known = [e for e in run.evaluations if e["eval_loss"] is not None]
    losses = [e["eval_loss"] for e in known]
    return _line(run, of, [e["step"] + 1 for e in known], losses) if known else None


def _training(run: RunFiles, of: Look) -> Line:
    losses = running_median(np.array([entry["loss"] for entry in run.steps], dtype=np.float64))
    return _line(run, of, [entry["step"] + 1 for entry in run.steps], losses.tolist())


def _differ(runs: Sequence[RunFiles]) -> list[str]:
    """Fields that make held-out losses incomparable."""
    differ = [field for field in LOSS_OF if len({repr(run.config.at(field)) for run in runs}) > 1]
    if not differ:
        return []
    return [f"runs differ in {', '.join(differ)}: their losses cannot be compared"]
