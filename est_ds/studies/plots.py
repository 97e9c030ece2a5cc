"""Figures of a study's answers: end points, paired differences, gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import plotly.graph_objects as go

from est_ds.report.interactive import (
    COST,
    NATS,
    OverCosts,
    line_of,
    look,
    marker_of,
    new_figure,
    switch,
)
from est_ds.report.style import BLACK
from est_ds.studies.arms import ArmAnswer, Compared
from est_ds.studies.snapshot import Snapshot
from est_ds.studies.statistics import Gain, Interval, t_interval
from est_ds.studies.text import (
    BUDGETS,
    gain_text,
    interval_text,
    p_text,
    verdict_text,
    windows_text,
)

LOSS = "held-out loss, nats a token"
ROW, FRAME = 30, 110  # pixels of an arm's row, and of what is around the rows
# An arm is not shown at first that reaches further than this many times the middle one.
FAR = 4.0
CURVE_POINTS = 60
Span = tuple[float, float]


@dataclass(frozen=True)
class Ends:
    """Finished runs of one arm and one budget.

    Attributes:
        x: what each cost.
        losses: by seed.
        note: what follows the arm's name at the pointer.
        named: whether it stands in the legend.
    """

    arm: str
    x: Mapping[str, float]
    losses: Mapping[int, float]
    note: str = ""
    named: bool = True


def end_points(snapshot: Snapshot) -> tuple[go.Figure, list[str]]:
    """Loss at the end of every run over its cost; and the arms that are out of sight at first."""
    figure = OverCosts(LOSS, snapshot.costs, height=500)
    _draw_fit(figure, snapshot)
    spans: dict[str, Span] = {}
    for ends in (*_baseline_ends(snapshot), *_arm_ends(snapshot)):
        span = _draw_ends(figure, snapshot, ends)
        low, high = spans.get(ends.arm, span)
        spans[ends.arm] = min(low, span[0]), max(high, span[1])
    shown, out = _near(spans, snapshot.baseline.name)
    return figure.finished(shown), out


def _draw_fit(figure: OverCosts, snapshot: Snapshot) -> None:
    """The mean of the seeds' curves, between the costs that all were fitted to."""
    curves, name = list(snapshot.answers.curves.values()), snapshot.baseline.name
    low = max((c.costs[0] for c in curves), default=0.0)
    high = min((c.costs[1] for c in curves), default=0.0)
    if not low < high:
        return
    flops = np.geomspace(low, high, CURVE_POINTS).tolist()
    losses = [float(np.mean([curve.loss(f) for curve in curves])) for f in flops]
    trace = go.Scatter(y=losses, mode="lines", line=line_of(snapshot.looks[name]), legendgroup=name)
    trace.update(name=f"{name}, fit", showlegend=True)
    figure.add(trace, snapshot.of_baseline(flops), f"<b>{name}</b>, fit<br>{NATS}<br>{COST}")


def _baseline_ends(snapshot: Snapshot) -> list[Ends]:
    dense = [r for r in snapshot.answers.dense if r.loss is not None]
    found = []
    for steps in sorted({r.steps for r in dense}):
        alike = [r for r in dense if r.steps == steps]
        x = {cost: values[0] for cost, values in snapshot.of_baseline([alike[0].flops]).items()}
        losses = {r.seed: r.loss for r in alike if r.loss is not None}
        found.append(Ends(snapshot.baseline.name, x, losses, f", {steps:,} steps", not found))
    return found


def _arm_ends(snapshot: Snapshot) -> list[Ends]:
    found = []
    for arm in snapshot.answers.arms[1:]:
        run = snapshot.run(arm)
        if run and arm.losses:
            x = {cost: values[0] for cost, values in snapshot.spent(arm, [run.steps]).items()}
            found.append(Ends(arm.name, x, arm.losses, f", {run.steps:,} steps"))
    return found


def _draw_ends(figure: OverCosts, snapshot: Snapshot, ends: Ends) -> Span:
    """Draws the runs faintly and their mean with its interval; returns what they span."""
    look, losses = snapshot.looks[ends.arm], list(ends.losses.values())
    mean, common = t_interval(losses), {"legendgroup": ends.arm, "name": ends.arm}
    name = f"<b>{ends.arm}</b>{ends.note}"
    trace = go.Scatter(
        y=losses,
        mode="markers",
        marker=marker_of(look, 7, open=True),
        opacity=0.6,
        text=[f"seed {seed}" for seed in ends.losses],
        showlegend=False,
        **common,
    )
    x = {cost: [value] * len(losses) for cost, value in ends.x.items()}
    figure.add(trace, x, f"{name}, %{{text}}<br>{NATS}<br>{COST}")
    trace = go.Scatter(
        y=[mean.mean],
        mode="markers",
        marker=marker_of(look, 11),
        error_y=_bar(mean, look.colour),
        showlegend=ends.named,
        **common,
    )
    x = {cost: [value] for cost, value in ends.x.items()}
    hover = f"{name}<br>mean of {len(losses)}: {interval_text(mean, '')} nats a token<br>{COST}"
    figure.add(trace, x, hover)
    bar = [end for end in (mean.low, mean.high) if end is not None]
    return min(losses + bar), max(losses + bar)


def _bar(interval: Interval, colour: str) -> dict | None:
    """The interval as an error bar."""
    if interval.low is None or interval.high is None:
        return None
    up, down = [interval.high - interval.mean], [interval.mean - interval.low]
    return {"type": "data", "array": up, "arrayminus": down, "color": colour, "thickness": 1.6}


def _near(spans: Mapping[str, Span], baseline: str) -> tuple[Span | None, list[str]]:
    """What is shown at first: the baseline, and the arms near it; and which are not."""
    if baseline not in spans:
        return None, []
    low, high = spans[baseline]
    reach = {n: max(high - lo, hi - low, 0.0) for n, (lo, hi) in spans.items() if n != baseline}
    out = _outliers({n: max(far, high - low) for n, far in reach.items()})
    if not out:
        return None, []
    kept = [span for name, span in spans.items() if name not in out]
    return _with_room([end for span in kept for end in span]), out


def _outliers(reach: Mapping[str, float]) -> list[str]:
    """Those that reach much further than the others."""
    if len(reach) < 2:
        return []
    return [name for name, far in reach.items() if far > FAR * median(sorted(reach.values()))]


def _with_room(values: Sequence[float]) -> Span:
    room = 0.08 * (max(values) - min(values)) or 0.01
    return min(values) - room, max(values) + room


def _rows(snapshot: Snapshot, title: str) -> go.Figure:
    """A figure with a row for every arm but the baseline, in their order from the top."""
    names = [arm.name for arm in snapshot.answers.arms[1:]]
    figure = new_figure("", height=FRAME + ROW * len(names))
    figure.update_xaxes(title_text=title, exponentformat="none")
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], gridcolor="#eef2f6")
    # Also rows of which nothing is known yet.
    figure.update_yaxes(range=[-0.6, len(names) - 0.4], type="category")
    return figure


def differences(snapshot: Snapshot) -> tuple[go.Figure, list[str]]:
    """Paired differences of all arms, by budget; and the arms that are out of sight at first."""
    figure = _rows(snapshot, "held-out loss less the baseline's, nats a token")
    figure.update_layout(showlegend=False)
    figure.add_vline(x=0, line={"color": BLACK, "width": 1.6})
    options, out = {}, []
    budgets = sorted(snapshot.runs.file.study.budgets, key=lambda b: b != snapshot.answers.decides)
    for budget in budgets:
        traces, far = [], {}
        for arm in snapshot.answers.arms[1:]:
            traces += _difference(snapshot, arm, budget)
            interval = _interval(arm.budgets.get(budget))
            if interval:
                ends = (interval.mean, interval.low, interval.high)
                far[arm.name] = max(abs(end) for end in ends if end is not None)
        away = _outliers(far)
        out += [f"{name} at equal {BUDGETS[budget]}" for name in away]
        reach = 1.1 * max([far[name] for name in far if name not in away] or [0.0]) or 0.01
        if budget == budgets[0]:
            figure.add_traces(traces)
            figure.update_xaxes(range=[-reach, reach])
        changes = {key: [t.to_plotly_json().get(key) for t in traces] for key in ("x", "text")}
        changes["error_x"] = [t.to_plotly_json().get("error_x", {}) for t in traces]
        options[f"equal {BUDGETS[budget]}"] = (changes, {"xaxis.range": [-reach, reach]})
    switch(figure, options)
    return figure, out


def _interval(compared: Compared | None) -> Interval | None:
    return compared.difference.interval if compared and compared.difference else None


def _difference(snapshot: Snapshot, arm: ArmAnswer, budget: str) -> list[go.Scatter]:
    """Differences of an arm's seeds, and their mean with its interval; empty if unknown."""
    compared, look = arm.budgets.get(budget), snapshot.looks[arm.name]
    interval, pairs = _interval(compared), snapshot.pairs(arm, compared)
    seeds = go.Scatter(
        x=list(pairs.values()),
        y=[arm.name] * max(1, len(pairs)),
        mode="markers",
        marker=marker_of(look, 7, open=True),
        opacity=0.6,
        text=[f"<b>{arm.name}</b>, seed {s}: {d:+.4f} nats a token" for s, d in pairs.items()],
        hovertemplate="%{text}<extra></extra>",
    )
    mean = go.Scatter(
        x=[interval.mean] if interval else [],
        y=[arm.name],
        mode="markers",
        marker=marker_of(look, 11),
        error_x=_bar(interval, look.colour) if interval else None,
        text=[_difference_text(arm.name, budget, compared)] if compared else [],
        hovertemplate="%{text}<extra></extra>",
    )
    return [seeds, mean]


def _difference_text(name: str, budget: str, compared: Compared) -> str:
    difference = compared.difference
    if difference is None:
        return ""
    lines = [
        f"<b>{name}</b> at equal {BUDGETS[budget]}, the baseline's {compared.steps:,} steps",
        f"{interval_text(difference.interval)} nats a token, {difference.pairs} seeds",
    ]
    if compared.corrected is not None:
        lines.append(f"p (Holm) {p_text(compared.corrected)}: {verdict_text(compared)}")
    if compared.windows:
        over = windows_text(compared.windows, difference.pairs)
        lines.append(f"over {compared.windows.count:,} held-out windows: {over}")
    return "<br>".join(lines)


def gains(snapshot: Snapshot) -> go.Figure | None:
    """Gain of every arm, in FLOPs and in seconds; None where none is known."""
    figure = _rows(snapshot, "gain: the baseline's cost over the arm's")
    figure.add_vline(x=1, line={"color": BLACK, "width": 1.6})
    for unit, open in (("FLOPs", False), ("seconds", True)):
        of = {a.name: a.gain_seconds if open else a.gain for a in snapshot.answers.arms[1:]}
        drawn = [_gain(snapshot, name, gain, unit, open) for name, gain in of.items() if gain]
        drawn = [trace for trace in drawn if trace]
        figure.add_traces(drawn)
        if drawn:  # the legend names the units; the arms stand at their rows
            sample = marker_of(look(None), 10, open)
            figure.add_trace(
                go.Scatter(x=[None], y=[None], marker=sample, mode="markers", name=f"in {unit}")
            )
            figure.data[-1].legendgroup = unit
    return figure if len(figure.data) else None


def _gain(snapshot: Snapshot, name: str, gain: Gain, unit: str, open: bool) -> go.Scatter | None:
    look, interval, colour = snapshot.looks[name], gain.interval, snapshot.looks[name].colour
    marker = marker_of(look, 11, open)
    if interval:
        x = interval.mean
    else:
        sign, _, number = gain.bound.partition(" ")
        if sign not in (">", "<"):
            return None
        x, marker["symbol"] = float(number), "triangle-right" if sign == ">" else "triangle-left"
        marker["symbol"] += "-open" if open else ""
    return go.Scatter(
        x=[x],
        y=[name],
        mode="markers",
        marker=marker,
        error_x=_bar(interval, colour) if interval else None,
        legendgroup=unit,
        showlegend=False,
        name=name,
        hovertemplate=f"<b>{name}</b><br>{gain_text(gain)} times in {unit}, {gain.pairs} seeds"
        f"<extra></extra>",
    )
