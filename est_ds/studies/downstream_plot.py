"""Held-out loss of the arms against their scores in tasks, drawn."""

from __future__ import annotations

import plotly.graph_objects as go

from est_ds.report.interactive import marker_of, new_figure, switch
from est_ds.studies.downstream import Downstream, Place
from est_ds.studies.plots import LOSS
from est_ds.studies.snapshot import Snapshot
from est_ds.studies.tasks import score_of


def downstream_plot(snapshot: Snapshot, found: dict[str, Downstream]) -> go.Figure | None:
    """Arms over loss and score, a button for each task; None where nothing is known."""
    figure, options = new_figure("share of right answers", height=500), {}
    figure.update_xaxes(title_text=LOSS, exponentformat="none")
    for task, each in found.items():
        known = {place.arm: place for place in each.places}
        traces = [_shorter(snapshot, task)]
        for arm in snapshot.answers.arms:
            traces += _arm(snapshot, arm.name, known.get(arm.name), task)
        if not options:
            figure.add_traces(traces)
        drawn = [trace.to_plotly_json() for trace in traces]
        changes = {key: [t.get(key) for t in drawn] for key in ("x", "y", "text")}
        changes |= {bar: [t.get(bar, {}) for t in drawn] for bar in ("error_x", "error_y")}
        options[task] = (changes, {})
    if not any(each.places for each in found.values()):
        return None
    switch(figure, options)
    return figure


def _arm(snapshot: Snapshot, name: str, place: Place | None, task: str) -> list[go.Scatter]:
    """Seeds of an arm, and their means with the spread of the seeds; empty if unknown."""
    look, losses = snapshot.looks[name], place.losses if place else {}
    seeds = go.Scatter(
        x=list(losses.values()),
        y=[place.scores[seed] for seed in losses] if place else [],
        mode="markers",
        marker=marker_of(look, 7, open=True),
        opacity=0.6,
        text=[f"<b>{name}</b>, seed {seed}" for seed in losses],
        hovertemplate="%{text}<br>%{x:.4f} nats a token<br>%{y:.4f} right<extra></extra>",
        name=name,
        legendgroup=name,
        showlegend=False,
    )
    spreads = place.spreads if place else None
    bars = [{"type": "data", "array": [s], "color": look.colour} for s in spreads or ()]
    mean = go.Scatter(
        x=[place.loss] if place else [],
        y=[place.score] if place else [],
        mode="markers",
        marker=marker_of(look, 11),
        error_x=bars[0] if bars else None,
        error_y=bars[1] if bars else None,
        text=[_mean_text(place, task)] if place else [],
        hovertemplate="%{text}<extra></extra>",
        name=name,
        legendgroup=name,
    )
    return [seeds, mean]


def _mean_text(place: Place, task: str) -> str:
    loss, score = ("", "") if place.spreads is None else (f" +- {s:.4f}" for s in place.spreads)
    return (
        f"<b>{place.arm}</b>, mean of {len(place.losses)}<br>{place.loss:.4f}{loss} nats a token"
        f"<br>{task} {place.score:.4f}{score}"
    )


def _shorter(snapshot: Snapshot, task: str) -> go.Scatter:
    """The baseline's runs of other budgets: what is scored at a loss that it has on its way."""
    name, asked = snapshot.baseline.name, snapshot.runs.file.study.evaluate
    run = snapshot.run(snapshot.baseline)
    found = []
    for result in snapshot.answers.dense:
        score = score_of(result, task, asked) if asked else None
        if score is not None and result.loss is not None and run and result.steps != run.steps:
            found.append((result.loss, score, f"seed {result.seed}, {result.steps:,} steps"))
    found.sort()
    marker = marker_of(snapshot.looks[name], 7, open=True) | {"symbol": "circle-open-dot"}
    return go.Scatter(
        x=[loss for loss, _, _ in found],
        y=[score for _, score, _ in found],
        mode="markers",
        marker=marker,
        text=[f"<b>{name}</b>, {words}" for _, _, words in found],
        hovertemplate="%{text}<br>%{x:.4f} nats a token<br>%{y:.4f} right<extra></extra>",
        name=f"{name}, other budgets",
        showlegend=bool(found),
    )
