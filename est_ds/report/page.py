"""The page of a run: one HTML file that needs no network and prints well."""

from __future__ import annotations

import base64
import io
import os
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from est_ds.disk import replace_text
from est_ds.errors import UserError
from est_ds.ranks.versions import versions
from est_ds.report import figures
from est_ds.report.files import RunFiles, read_run
from est_ds.report.style import styled
from est_ds.report.summary import Summary, summary_of
from est_ds.report.text import PHASE_COLUMNS, fact_rows, notes, phase_row, title

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

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>$title</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d232b; background: #fff;
  max-width: 54rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #d8dde3; }
.lead { color: #5b6672; margin: .2rem 0 1.6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .9rem .28rem 0; text-align: left; vertical-align: top; }
.phases { width: 100%; }
.phases th, .phases td { text-align: right; border-bottom: 1px solid #e6e9ed; }
.phases th:first-child, .phases td:first-child { text-align: left; }
.phases th { vertical-align: bottom; font-weight: 600; }
.facts th { font-weight: 400; color: #5b6672; white-space: nowrap; }
figure { margin: 1.6rem 0 0; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
figcaption, .note { color: #5b6672; font-size: .86rem; }
pre { background: #f5f7f9; padding: .9rem 1.1rem; font-size: .8rem; line-height: 1.4;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { body { font-size: 10pt; margin: 0; max-width: none; } h2 { break-after: avoid; } }
</style>
</head>
<body>
<h1>$heading</h1>
<p class="lead">$lead</p>
<table class="facts">$facts</table>
<h2>Phases</h2>
<table class="phases">$phases</table>
<p class="note">$notes</p>
<h2>Curves</h2>
$figures
<h2>Configuration</h2>
<pre>$config</pre>
<h2>Versions</h2>
<table class="facts">$versions</table>
<p class="note">Of the installation that drew this page.</p>
</body>
</html>
""")


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
    try:
        replace_text(file, page)
    except OSError as e:
        raise UserError(
            f"report {str(file)!r} cannot be written: {e.strerror or e}; make the run directory "
            f"writable, or give a copy of it."
        ) from None
    return file


def render(run: RunFiles, summary: Summary) -> str:
    """The page as text; well-formed XML too."""
    heads = [name.replace("\n", " ") for name in PHASE_COLUMNS]
    rows = [phase_row(phase) for phase in summary.phases]
    head = _row(heads, "th", "th")
    return PAGE.substitute(
        title=escape(f"{summary.run_dir}: est_ds report"),
        heading=escape(summary.run_dir),
        lead=escape(title(summary).removeprefix(f"{summary.run_dir}: ")),
        facts="".join(_row(row, "th", "td") for row in fact_rows(summary)),
        phases=f"<thead>{head}</thead><tbody>{''.join(_row(r, 'td', 'td') for r in rows)}</tbody>",
        notes=escape(" ".join(notes(summary))),
        figures="\n".join(_figure(draw(run, summary), text) for draw, text in FIGURES),
        config=escape((run.directory / "config.yaml").read_text()),
        versions="".join(_row(row, "th", "td") for row in versions().items()),
    )


def _row(cells: tuple[str, ...] | list[str], first: str, rest: str) -> str:
    tags = [first] + [rest] * (len(cells) - 1)
    return f"<tr>{''.join(f'<{t}>{escape(cell)}</{t}>' for t, cell in zip(tags, cells))}</tr>\n"


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
