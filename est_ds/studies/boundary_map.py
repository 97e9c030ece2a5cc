"""A map of a study's arms whose method is one and whose phase boundaries differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from est_ds.report.interactive import new_figure, switch
from est_ds.report.style import BLUE, RED
from est_ds.studies.arms import ArmAnswer
from est_ds.studies.snapshot import Snapshot
from est_ds.studies.statistics import Gain
from est_ds.studies.text import gain_text, interval_text

FEWEST = 4  # arms; fewer make no map
# Red for what is worse than the baseline, blue for what is better, white between.
SCALE = [(0.0, RED), (0.5, "#f4f4f4"), (1.0, BLUE)]
LEAST_SPAN = 0.01  # nats, of the colours to either side of white


@dataclass(frozen=True)
class Place:
    """An arm on a map: its first two boundaries, as fractions of the run."""

    arm: ArmAnswer
    first: float
    second: float


def boundary_map(snapshot: Snapshot) -> go.Figure | None:
    """Difference from the baseline over the first and the second boundary of the phases.

    A button for each method and rates of which at least `FEWEST` arms with three phases are known;
    None without any.
    """
    maps = {name: places for name, places in _maps(snapshot).items() if len(places) >= FEWEST}
    if not maps:
        return None
    figure, decides = new_figure("end of the second phase", height=460), snapshot.answers.decides
    span = max(abs(_difference(p.arm, decides)) for places in maps.values() for p in places)
    span = max(span, LEAST_SPAN)
    options = {}
    for name, places in maps.items():
        values = [_difference(place.arm, decides) for place in places]
        trace = go.Scatter(
            x=[_share(place.first) for place in places],
            y=[_share(place.second) for place in places],
            mode="markers+text",
            text=[f"{v:+.3f}<br>{_gain(p.arm.gain)}" for v, p in zip(values, places)],
            customdata=[_hover(place.arm, decides) for place in places],
            hovertemplate="%{customdata}<extra></extra>",
            marker={
                "symbol": "square",
                "size": 64,
                "color": [-value for value in values],
                "colorscale": SCALE,
                "cmin": -span,
                "cmax": span,
            },
            showlegend=False,
        )
        if not figure.data:
            figure.add_trace(trace)
        drawn = trace.to_plotly_json()
        changes = {key: [drawn[key]] for key in ("x", "y", "text", "customdata")}
        changes["marker.color"] = [drawn["marker"]["color"]]
        options[name] = (changes, {})
    of = [place for places in maps.values() for place in places]
    for axis, ends in (("xaxis", {p.first for p in of}), ("yaxis", {p.second for p in of})):
        names = [_share(end) for end in sorted(ends)]
        figure.layout[axis].update(type="category", categoryorder="array", categoryarray=names)
        figure.layout[axis].range = [-0.6, len(names) - 0.4]
    figure.update_xaxes(title_text="end of the first phase, as a part of the run")
    switch(figure, options)
    return figure


def _maps(snapshot: Snapshot) -> dict[str, list[Place]]:
    """Known arms by what they are but for their first two boundaries."""
    found: dict[str, list[Place]] = {}
    for arm in snapshot.answers.arms[1:]:
        compared = arm.budgets.get(snapshot.answers.decides)
        run = snapshot.run(arm)
        if run is None or compared is None or compared.difference is None:
            continue
        phases = run.config.method.get("phases") or []
        if len(phases) != 3:
            continue
        design = snapshot.runs.design(arm.name, run.values)
        first, second = (p.until_step / run.steps for p in design.method.phases[:2])
        found.setdefault(_kind(run.config.method), []).append(Place(arm, first, second))
    return found


def _kind(method: dict[str, Any]) -> str:
    """A method in words, without the ends of its phases."""
    phases = [{k: v for k, v in p.items() if k not in ("until", "name")} for p in method["phases"]]
    others = {k: v for k, v in method.items() if k not in ("name", "phases")}
    words = [", ".join(f"{k} {v:g}" for k, v in phase.items()) or "all" for phase in phases]
    return f"{method['name']}: {'; '.join(words)}" + (f" {json.dumps(others)}" if others else "")


def _share(end: float) -> str:
    return f"{end:.3g}"


def _gain(gain: Gain | None) -> str:
    return f"{gain.interval.mean:.2f}" if gain and gain.interval else gain_text(gain)


def _difference(arm: ArmAnswer, budget: str) -> float:
    return arm.budgets[budget].difference.interval.mean


def _hover(arm: ArmAnswer, budget: str) -> str:
    compared = arm.budgets[budget]
    lines = [
        f"<b>{arm.name}</b>",
        f"{interval_text(compared.difference.interval)} nats a token, "
        f"{compared.difference.pairs} seeds",
        f"{arm.flops_ratio or 1:.3f} of the FLOPs, gain {gain_text(arm.gain)}",
    ]
    return "<br>".join(lines)
