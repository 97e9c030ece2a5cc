"""Figures of a study's runs: held-out curves, and loss over tuned values."""

from __future__ import annotations

import json
from collections import defaultdict
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from est_ds.report.curves import Line, curves_figure
from est_ds.report.interactive import NATS, line_of, marker_of, new_figure
from est_ds.studies.arms import ArmAnswer
from est_ds.studies.plots import LOSS
from est_ds.studies.results import RunResult
from est_ds.studies.snapshot import Snapshot

Curve = list[tuple[int, float]]


def held_out_curves(snapshot: Snapshot) -> go.Figure | None:
    """Held-out loss of every arm's runs; None before there is one."""
    lines = []
    for arm in snapshot.answers.arms:
        by_seed = snapshot.by_seed(arm)
        for seed, result in by_seed.items():
            if result.curve:
                lines.append(_line(snapshot, arm, result.curve, f", seed {seed}", False))
        if mean := mean_curve([r for r in by_seed.values() if r.loss is not None]):
            lines.append(_line(snapshot, arm, mean, ", mean of the seeds"))
    return curves_figure(lines, snapshot.costs, LOSS) if lines else None


def _line(snapshot: Snapshot, arm: ArmAnswer, curve: Curve, note: str, bold: bool = True) -> Line:
    x = snapshot.spent(arm, [steps for steps, _ in curve])
    return Line(arm.name, note, snapshot.looks[arm.name], x, [loss for _, loss in curve], bold)


def mean_curve(results: list[RunResult]) -> Curve:
    """Mean over runs where all of them were evaluated."""
    losses = defaultdict(list)
    for result in results:
        for steps, loss in result.curve:
            losses[steps].append(loss)
    return [(s, fmean(of)) for s, of in sorted(losses.items()) if len(of) == len(results)]


def tuning_curves(snapshot: Snapshot) -> dict[str, go.Figure]:
    """Loss on the first seed over the values of every tuned field, by field."""
    tuned = [arm.grid[0] for arm in snapshot.runs.file.arms.values() if len(arm.grid) > 1]
    fields = dict.fromkeys(field for values in tuned for field, _ in values)
    found = {field: _tuning(snapshot, field) for field in fields}
    return {field: figure for field, figure in found.items() if figure}


def _tuning(snapshot: Snapshot, field: str) -> go.Figure | None:
    figure, numeric = new_figure(LOSS), True
    for answer in snapshot.answers.arms:
        best = _best(snapshot, answer.name, field)
        if not best:
            continue
        look, values = snapshot.looks[answer.name], list(best)
        numeric &= all(isinstance(v, (int, float)) and v > 0 for v in values)
        chosen = dict(answer.values or ()).get(field)
        marker = marker_of(look, 8)
        marker["opacity"] = 1.0
        marker["size"] = [14 if json.dumps(v) == chosen else 8 for v in values]
        figure.add_trace(
            go.Scatter(
                x=values,
                y=list(best.values()),
                name=answer.name,
                marker=marker,
                line=line_of(look),
                mode="lines+markers",
                hovertemplate=f"<b>{answer.name}</b>, {field}=%{{x}}<br>{NATS}<extra></extra>",
            )
        )
    if not figure.data:
        return None
    tried = sorted({x for trace in figure.data for x in trace.x}) if numeric else None
    ticks = {"tickvals": tried, "ticktext": [f"{v:g}" for v in tried]} if tried else {}
    figure.update_xaxes(title_text=field, type="log" if numeric else "category", **ticks)
    figure.update_layout(showlegend=True)
    return figure


def _best(snapshot: Snapshot, name: str, field: str) -> dict[Any, float]:
    """The lowest loss of an arm on the first seed at every value of a field, in order."""
    arm, first = snapshot.runs.file.arms[name], next(iter(snapshot.runs.file.seeds))
    best: dict[Any, float] = {}
    for values in arm.grid if len(arm.grid) > 1 else ():
        result = snapshot.results.runs.get(snapshot.runs.run(name, first, values).key)
        text = dict(values).get(field)
        if text is None or result is None or result.loss is None:
            continue
        value = json.loads(text)
        value = value if isinstance(value, (int, float)) else text
        best[value] = min(result.loss, best.get(value, result.loss))
    try:
        return dict(sorted(best.items()))
    except TypeError:  # numbers and words
        return best
