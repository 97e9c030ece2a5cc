"""The page of a run: one HTML file that needs no network and prints well."""

from __future__ import annotations

import base64
import io
import os
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from est_ds.ranks.versions import versions
from est_ds.report import figures
from est_ds.report import score_tables as scores
from est_ds.report.analyses import analyses
from est_ds.report.files import RunFiles, read_run
from est_ds.report.frame import framed, row, table, write_whole
from est_ds.report.style import styled
from est_ds.report.summary import Summary, summary_of
from est_ds.report.text import PHASE_COLUMNS, fact_rows, notes, phase_row, title
from est_ds.run.scores import read_evaluations, read_fine_tunings

FILE = "report.html"

FIGURES = (
    (
        figures.loss_figure,
        "Training loss is that of each step's subnetwork, thin as logged and bold as a running "
        "median; held-out loss is that of the full model, or of one that grows as deep as it was "
        "then. The unigram entropy is the loss of a model that knows how frequent every token is "
        "and nothing else.",
    ),
    (
        figures.step_time_figure,
        "One point a logged step; lines are the phases' medians. Grey steps are not compared: they "
        "are of another layout, or the first after a start. Evaluations and checkpoints do not "
        "count. Phases follow each other, so that a machine whose load changes looks like a saving "
        "or a loss: for seconds to rely on, leave the machine to the run.",
    ),
    (
        figures.flops_figure,
        "All matrix products of forward and backward passes, attention scores and output head "
        "included.",
    ),
    (figures.learning_rate_figure, "As logged."),
)

BODY = Template("""<h1>$heading</h1>
<p class="lead">$lead</p>
<table class="facts">$facts</table>
<h2>Phases</h2>
<table class="phases">$phases</table>
<p class="note">$notes</p>
<h2>Curves</h2>
$figures
$scores
$analyses
<h2>Configuration</h2>
<pre>$config</pre>
<h2>Versions</h2>
<table class="facts">$versions</table>
<p class="note">Of the installation that drew this page.</p>""")


def write_report(run_dir: str | os.PathLike) -> Path:
    """Writes `report.html` into a run directory, finished or not, whole or not at all.

    Returns:
        The path of the page.

    Raises:
        UserError: it is no run directory, its metrics are missing or incomplete, or the page
            cannot be written.
    """
    run = read_run(run_dir)
    file = run.directory / FILE
    page = render(run, summary_of(run))
    write_whole(file, page, "make the run directory writable, or give a copy of it")
    return file


def render(run: RunFiles, summary: Summary) -> str:
    """The page as text; well-formed XML too."""
    heads = [name.replace("\n", " ") for name in PHASE_COLUMNS]
    rows = [phase_row(phase) for phase in summary.phases]
    body = BODY.substitute(
        heading=escape(summary.run_dir),
        lead=escape(title(summary).removeprefix(f"{summary.run_dir}: ")),
        facts="".join(row(cells, "th", "td") for cells in fact_rows(summary)),
        phases=table(heads, rows),
        notes=escape(" ".join(notes(summary))),
        figures="\n".join(_figure(draw(run, summary), text) for draw, text in FIGURES),
        scores=_scores(run.directory),
        analyses=analyses(run.directory),
        config=escape((run.directory / "config.yaml").read_text()),
        versions="".join(row(cells, "th", "td") for cells in versions().items()),
    )
    return framed(f"{summary.run_dir}: est_ds report", body)


def _scores(run_dir: Path) -> str:
    """What checkpoints score, by `est-ds eval` and `est-ds finetune`; nothing if none was asked."""
    evaluations, tunings = read_evaluations(run_dir), read_fine_tunings(run_dir)
    parts = [
        (scores.HELD_OUT_HEADS, scores.held_out_rows(evaluations), scores.ERRORS),
        (scores.TASK_HEADS, scores.task_rows(evaluations), ""),
        (scores.TUNING_HEADS, scores.tuning_rows(tunings), scores.SPREAD),
    ]
    tables = (
        f'<table class="phases">{table(heads, rows)}</table>\n<p class="note">{escape(note)}</p>\n'
        for heads, rows, note in parts
        if rows
    )
    body = "".join(tables)
    return f"<h2>Scores of checkpoints</h2>\n{body}" if body else ""


def _figure(figure: Figure, caption: str) -> str:
    """A figure as an image that carries its own data; as an image it keeps its ids to itself."""
    file = io.BytesIO()
    with styled():
        figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode("ascii")
    name = escape(figure.axes[0].get_title(loc="left"))
    return (
        f'<figure><img alt="{name}" src="data:image/svg+xml;base64,{data}"/>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
