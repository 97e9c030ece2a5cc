"""Held-out losses at both sides of phase boundaries.

`RunResult.boundaries` holds the lines that `evaluate.boundaries` writes, two a boundary: `step`
(the first of the phase after), `boundary` (`before` or `after`), `phase` (that on this side),
`full_loss` and `subnetwork_loss`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from est_ds.report.interactive import GREY, MENU, NATS, PAPER, line_of, look, marker_of, new_figure
from est_ds.studies.plots import LOSS
from est_ds.studies.results import RunResult
from est_ds.studies.run_plots import Curve, mean_curve
from est_ds.studies.snapshot import Snapshot

LOSSES = {"full_loss": "full model", "subnetwork_loss": "subnetworks"}
SIDES = ("before", "after")
# Of a run: what a zoom shows on either side, and how far from its step a side is drawn.
AROUND, BESIDE = 0.1, 0.004


@dataclass(frozen=True)
class BoundaryMeans:
    """Means over the seeds of an arm.

    Attributes:
        step: steps done.
        phases: before and after.
        losses: before and after, of the full model and of the phases' subnetworks.
    """

    step: int
    phases: tuple[str, str]
    losses: dict[str, tuple[float, float]]


def boundaries(snapshot: Snapshot) -> go.Figure | None:
    """Arms at their phase boundaries; None where no boundary was evaluated."""
    figure, zooms = new_figure(LOSS, height=500), {}
    for arm in snapshot.answers.arms:
        results = [r for r in snapshot.by_seed(arm).values() if r.loss is not None and r.boundaries]
        found = boundaries_of(results)
        if not found:
            continue
        curve, steps = mean_curve(results), results[0].steps
        _draw_curve(figure, snapshot, arm.name, curve)
        for boundary in found:
            _draw_sides(figure, snapshot, arm.name, boundary, BESIDE * steps)
            name = f"{arm.name}: {' to '.join(boundary.phases)}, step {boundary.step:,}"
            zooms[name] = _zoom(boundary, curve, AROUND * steps)
    if not zooms:
        return None
    for loss, name in LOSSES.items():
        sample = marker_of(look(None), 10, loss != "full_loss")
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=sample, name=name))
    figure.update_xaxes(title_text="optimizer steps done", exponentformat="none")
    figure.update_layout(_menu(zooms), **next(iter(zooms.values())))
    return figure


def boundaries_of(results: list[RunResult]) -> list[BoundaryMeans]:
    """Boundaries of which both sides are known, in order."""
    lines: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for line in (line for result in results for line in result.boundaries):
        if {"step", "boundary", "phase", *LOSSES} <= line.keys():
            lines[line["step"], line["boundary"]].append(line)
    found = []
    for step in sorted({step for step, _ in lines}):
        sides = [lines.get((step, side), []) for side in SIDES]
        if not all(sides):
            continue
        phases = tuple(str(alike[0]["phase"]) for alike in sides)
        losses = {n: tuple(fmean(line[n] for line in alike) for alike in sides) for n in LOSSES}
        found.append(BoundaryMeans(step, phases, losses))
    return found


def _draw_curve(figure: go.Figure, snapshot: Snapshot, name: str, curve: Curve) -> None:
    hover = f"<b>{name}</b>, full model<br>{NATS}<br>%{{x:,}} steps done<extra></extra>"
    figure.add_trace(
        go.Scatter(
            x=[steps for steps, _ in curve],
            y=[loss for _, loss in curve],
            mode="lines",
            line=line_of(snapshot.looks[name], 1.4),
            name=name,
            legendgroup=name,
            hovertemplate=hover,
        )
    )


def _draw_sides(
    figure: go.Figure, snapshot: Snapshot, name: str, boundary: BoundaryMeans, beside: float
) -> None:
    for loss, model in LOSSES.items():
        line = line_of(snapshot.looks[name], 1.4)
        line["dash"] = "solid" if loss == "full_loss" else "dot"
        texts = [
            f"<b>{name}</b>, {model}, {side} step {boundary.step + 1:,} "
            f"(phase {phase})<br>{value:.4f} nats a token"
            for side, phase, value in zip(
                ("before", "from"), boundary.phases, boundary.losses[loss]
            )
        ]
        figure.add_trace(
            go.Scatter(
                x=[boundary.step - beside, boundary.step + beside],
                y=list(boundary.losses[loss]),
                mode="lines+markers",
                marker=marker_of(snapshot.looks[name], 10, loss != "full_loss"),
                line=line,
                text=texts,
                hovertemplate="%{text}<extra></extra>",
                name=name,
                legendgroup=name,
                showlegend=False,
            )
        )


def _zoom(boundary: BoundaryMeans, curve: Curve, around: float) -> dict[str, list[float]]:
    """The ranges of both axes around a boundary."""
    near = [value for pair in boundary.losses.values() for value in pair]
    near += [loss for steps, loss in curve if abs(steps - boundary.step) <= around]
    room = 0.1 * (max(near) - min(near)) or 0.01
    return {
        "xaxis_range": [boundary.step - around, boundary.step + around],
        "yaxis_range": [min(near) - room, max(near) + room],
    }


def _menu(zooms: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """A list of the boundaries, which shows the one chosen."""
    buttons = [
        {
            "label": name,
            "method": "relayout",
            "args": [{key.replace("_", "."): ends for key, ends in zoom.items()}],
        }
        for name, zoom in zooms.items()
    ]
    whole = {"xaxis.autorange": True, "yaxis.autorange": True}
    buttons.append({"label": "whole runs", "method": "relayout", "args": [whole]})
    place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 8}}
    menu = {"buttons": buttons, "bgcolor": PAPER, "bordercolor": GREY, **place}
    return {"updatemenus": [menu], "margin_t": MENU}
