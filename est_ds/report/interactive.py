"""Figures that answer the pointer: Plotly's, embedded whole, with no script of our own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from est_ds.report import frame
from est_ds.report.figures import PHASE_COLOURS
from est_ds.report.style import BLACK, GREY

# Beside black; seven of them and eight markers come together again after 56 things.
COLOURS = (*PHASE_COLOURS, "#882255")
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
# Of a line; between more of them nobody sees a difference.
MAX_POINTS = 300
NATS = "%{y:.4f} nats a token"
COST = "{cost}"  # in a hover text: the cost that the axis shows, with its unit
MENU = 46  # pixels above a plot, for buttons
ROW = 40  # characters of a row of buttons
GRID, PAPER = "#d8dde3", "#ffffff"
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "displayModeBar": False,  # it would cover the buttons; dragging zooms, a double click shows all
}
STYLE = (
    frame.STYLE
    + """
body { max-width: 66rem; }
figcaption { margin-top: .4rem; }
.wide { overflow-x: auto; }
.rows { width: 100%; font-size: .86rem; }
.rows th, .rows td { text-align: right; border-bottom: 1px solid #e6e9ed; padding-right: .7rem; }
.rows th { vertical-align: bottom; font-weight: 600; }
.rows td { white-space: pre; }
.rows th:first-child, .rows td:first-child { text-align: left; position: sticky; left: 0;
  background: #fff; }
.warnings { background: #fdf3e1; border-left: 4px solid #e69f00; padding: .6rem 1rem .6rem 2rem;
  font-size: .9rem; }
.headline { font-size: 1.1rem; margin: .6rem 0; }
@media print { body { max-width: none; } .wide { overflow: visible; } .rows { font-size: 7.5pt; }
  .rows th:first-child, .rows td:first-child { position: static; }
  .rows td { white-space: pre-wrap; } }"""
)


@dataclass(frozen=True)
class Look:
    """How one of several things looks, in every figure."""

    colour: str
    marker: str
    dash: str


def look(index: int | None) -> Look:
    """That of one of many; None: of what they are compared with, which is black.

    Of 56 in a row all differ in colour or marker, and of 28 in colour or dash.
    """
    if index is None:
        return Look(BLACK, "circle", "solid")
    number = len(COLOURS)
    dash = DASHES[index // number % len(DASHES)]
    return Look(COLOURS[index % number], MARKERS[(1 + index) % len(MARKERS)], dash)


@dataclass(frozen=True)
class Cost:
    """A horizontal axis.

    Attributes:
        button: its name on the button that shows it.
        title: its name on the axis.
        hover: a value with its unit, as Plotly writes one.
        ticks: how the axis writes large values, as Plotly names it.
    """

    button: str
    title: str
    hover: str
    ticks: str


COSTS = {
    "tokens": Cost("tokens", "tokens trained", "%{x:.4~s} tokens", "SI"),
    "flops": Cost("FLOPs", "model FLOPs", "%{x:.4~g} FLOPs", "power"),
    "seconds": Cost("seconds", "seconds of training steps", "%{x:,.4~g} s", "none"),
}
By = Mapping[str, Sequence[float]]  # values of the horizontal axis, by cost


def new_figure(ylabel: str, height: int = 440) -> go.Figure:
    """A figure as wide as the page."""
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GREY, "automargin": True}
    return go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": height,
            "margin": {"l": 10, "r": 10, "t": 12, "b": 10},
            "font": {"size": 12, "color": BLACK, "family": "system-ui, sans-serif"},
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "hovermode": "closest",
            "hoverlabel": {"align": "left"},
            "xaxis": {**axis, "showline": True, "exponentformat": "power"},
            "yaxis": {**axis, "title": {"text": ylabel}},
            "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        }
    )


def line_of(look: Look, width: float = 2.2) -> dict:
    return {"color": look.colour, "dash": look.dash, "width": width}


def marker_of(look: Look, size: int = 10, open: bool = False) -> dict:
    symbol = f"{look.marker}-open" if open else look.marker
    return {"color": look.colour, "symbol": symbol, "size": size}


class OverCosts:
    """A figure whose horizontal axis is one of several costs, chosen by buttons.

    Args:
        costs: names in `COSTS`, the one that is shown first at the front.
    """

    def __init__(self, ylabel: str, costs: Sequence[str], height: int = 440) -> None:
        self._figure = new_figure(ylabel, height)
        self._costs = costs
        self._x: list[By] = []
        self._hovers: list[str] = []

    def add(self, trace: go.Scatter, x: By, hover: str) -> None:
        """Adds a trace; it is not drawn over costs that are not known of it.

        Args:
            hover: text at the pointer, with `COST` where the cost stands.
        """
        trace.x = list(x.get(self._costs[0], ()))
        self._x.append(x)
        self._hovers.append(f"{hover}<extra></extra>")
        self._figure.add_trace(trace)

    def finished(self, y_range: Sequence[float] | None = None) -> go.Figure:
        """The figure with its buttons.

        Args:
            y_range: what is shown at first; None: everything.
        """
        figure, options = self._figure, {}
        for name in self._costs:
            cost = COSTS[name]
            hovers = [hover.replace(COST, cost.hover) for hover in self._hovers]
            traces = {"x": [list(x.get(name, ())) for x in self._x], "hovertemplate": hovers}
            layout = {"xaxis.title.text": cost.title, "xaxis.exponentformat": cost.ticks}
            layout["xaxis.autorange"] = True
            options[cost.button] = (traces, layout)
        for trace, hover in zip(figure.data, self._hovers):
            trace.hovertemplate = hover.replace(COST, COSTS[self._costs[0]].hover)
        first = COSTS[self._costs[0]]
        figure.update_xaxes(title_text=first.title, exponentformat=first.ticks)
        if y_range is not None:
            figure.update_yaxes(range=list(y_range))
        switch(figure, options)
        return figure


def switch(figure: go.Figure, options: Mapping[str, tuple[dict, dict]]) -> None:
    """Adds a row of buttons, if there is a choice; a list where a narrow window has no room for it.

    Args:
        options: by button what it changes of the traces and of the layout.
    """
    if len(options) < 2:
        return
    buttons = [
        {"label": name, "method": "update", "args": list(changes)}
        for name, changes in options.items()
    ]
    place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 8}}
    look = {"bgcolor": PAPER, "bordercolor": GREY, "font": {"size": 12}}
    row = sum(map(len, options)) <= ROW
    kind = {"type": "buttons", "direction": "right"} if row else {"type": "dropdown"}
    menu = {**kind, "buttons": buttons, "showactive": True}
    figure.update_layout(updatemenus=[{**menu, **place, **look}], margin_t=MENU)


def thinned(count: int) -> list[int]:
    """Indices of at most `MAX_POINTS` of `count` points, first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).astype(int)).tolist()


def figure_html(figure: go.Figure, name: str, caption: str) -> str:
    """A figure with its caption.

    Args:
        name: its id on the page.
    """
    drawn = plotly.io.to_html(
        figure,
        config=CONFIG,
        include_plotlyjs=False,
        full_html=False,
        div_id=name,
        default_height=f"{figure.layout.height}px",
    )
    return f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def wide_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself where the page is narrow."""
    return f'<div class="wide"><table class="rows">{frame.table(heads, rows)}</table></div>'


def warnings_html(warnings: Sequence[str]) -> str:
    """A list of warnings; nothing where there is none."""
    listed = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<ul class="warnings">{listed}</ul>' if listed else ""


def page(title: str, body: str) -> str:
    """A whole page, with the library that its figures need."""
    head = f"<script>{get_plotlyjs()}</script>\n"
    silent = '<noscript><p class="note">Figures need JavaScript; tables do not.</p></noscript>\n'
    return frame.framed(title, silent + body, STYLE, head)
