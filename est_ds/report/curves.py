"""Held-out loss of several runs while they train, over what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from est_ds.report.interactive import COST, NATS, By, Look, OverCosts, line_of, thinned

# Of a run: what is above the loss at this part of it is not shown at first.
BEGIN = 0.2
# Nats: a model that guesses among 268,000 tokens. A run that ends above it has learnt nothing.
GUESS = 12.5
SHOWN = (
    f"At first the plot reaches up to the losses after the first fifth, and to the end of every "
    f"curve that ends below {GUESS} nats; a run that ends above has diverged. A double click shows "
    f"all."
)


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: what it is in the legend; lines of one name are shown and hidden together.
        note: what follows it at the pointer.
        x: costs by name, as long as `y` or not known.
        y: nats a token.
        bold: the one of its name that stands in the legend.
    """

    name: str
    note: str
    look: Look
    x: By
    y: Sequence[float]
    bold: bool = True


def curves_figure(lines: Sequence[Line], costs: Sequence[str], ylabel: str) -> go.Figure:
    """Curves over costs that buttons choose; the legend hides and shows them."""
    figure = OverCosts(ylabel, costs, height=500)
    for line in sorted(lines, key=lambda line: line.bold):
        shown = thinned(len(line.y)) if line.y else []
        name = escape(line.name)
        trace = go.Scatter(
            y=[line.y[i] for i in shown],
            name=name,
            legendgroup=line.name,
            showlegend=line.bold,
            mode="lines+markers" if line.bold and len(shown) <= 40 else "lines",
            marker={"size": 6, "symbol": line.look.marker},
            line=line_of(line.look, 2.4 if line.bold else 0.9),
            opacity=1.0 if line.bold else 0.5,
        )
        x = {cost: [values[i] for i in shown] for cost, values in line.x.items()}
        figure.add(trace, x, f"<b>{name}</b>{escape(line.note)}<br>{NATS}<br>{COST}")
    return figure.finished(_opened(lines))


def _opened(lines: Sequence[Line]) -> tuple[float, float] | None:
    """What is shown at first: from the lowest loss to where most curves are after a fifth, and to
    the end of every one that has not diverged."""
    bold = [[loss for loss in line.y if math.isfinite(loss)] for line in lines if line.bold]
    bold = [y for y in bold if y]
    bold = [y for y in bold if y[-1] <= GUESS] or bold
    begun = sorted(y[int(BEGIN * len(y))] for y in bold if len(y) > 1)
    if not begun:
        return None
    most = begun[(len(begun) - 1) // 2]
    top = max([most, *(y[-1] for y in bold if y[-1] <= GUESS)])
    bottom = min(min(y) for y in bold)
    room = 0.06 * (top - bottom)
    return (bottom - room, top + room) if top > bottom else None
