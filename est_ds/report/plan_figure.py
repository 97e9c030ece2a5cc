"""The figure of a plan: what is kept over time, and FLOPs against dense training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from est_ds.cost.flops import step_flops
from est_ds.design import Outline
from est_ds.plans.methods.base import full_loads
from est_ds.report import style
from est_ds.report.estimate import Estimate, mean_kept
from est_ds.report.style import BLACK, GREY, ORANGE, RED, SKY

# Loads of a step cost little, but a run may have millions of steps.
MAX_SAMPLES = 1000


def write_plan_figure(estimate: Estimate, file: Path) -> Path:
    """Draws a plan into `file`.

    Raises:
        UserError: the file's ending names no picture format, or it cannot be written.
    """
    return style.write_figure(plan_figure(estimate), file)


@style.styled()
def plan_figure(estimate: Estimate) -> Figure:
    """Two plots over the steps: fractions kept, and cumulative FLOPs."""
    design = estimate.design
    config, method = design.config, design.method
    figure = Figure(figsize=(7.6, 6.4), layout="constrained")
    kept, flops = figure.subplots(2, 1)
    style.dress(kept, f"Kept on average: {config.method['name']}", "fraction of the full model")
    style.dress(flops, "Model FLOPs of the run", "cumulative FLOPs")
    for axes in (kept, flops):
        style.shade_phases(axes, method.phases, config.steps)
    _draw_kept(kept, design)
    _draw_flops(flops, estimate)
    return figure


def _samples(design: Outline) -> np.ndarray:
    """Steps to draw, first and last of every phase among them, int64 [n]."""
    steps = design.config.steps
    spread = np.linspace(0, steps - 1, min(steps, MAX_SAMPLES)).astype(int)
    ends = [s for p in design.method.phases for s in (p.from_step, p.until_step - 1)]
    return np.unique(np.concatenate([spread, ends]))


def _draw_kept(axes: Axes, design: Outline) -> None:
    method, samples = design.method, _samples(design)
    dense = mean_kept(method.shape, full_loads(method.shape))
    kept = [mean_kept(method.shape, method.loads(int(step))) for step in samples]
    # A step's value holds until the next step.
    edges = np.append(samples, design.config.steps)
    # Nested widths: lines that coincide stay visible.
    lines = [("layers", SKY, 7.0), ("heads", ORANGE, 3.5), ("columns", BLACK, 1.2)]
    if any(k.positions < 1.0 for k in kept):
        lines.append(("positions", RED, 2.0))
    for name, colour, width in lines:
        share = [getattr(k, name) / getattr(dense, name) for k in kept]
        axes.step(edges, [*share, share[-1]], where="post", color=colour, lw=width, label=name)
    axes.set_ylim(0, 1.05)
    axes.legend(loc="lower right", ncols=len(lines))


def _draw_flops(axes: Axes, estimate: Estimate) -> None:
    design, dense = estimate.design, estimate.dense_step_flops
    config, method = design.config, design.method
    size = design.flops_size(config.batch.global_)
    samples = _samples(design)
    loads = [method.computed(method.loads(int(step))) for step in samples]
    active = [step_flops(method.shape, some, **size).model for some in loads]
    edges = np.append(samples, config.steps)
    total = np.concatenate([[0.0], np.cumsum(np.diff(edges) * active)])
    unit, text = style.power_of_thousand(config.steps * dense)
    axes.set_ylabel(f"cumulative FLOPs, {text}")
    axes.plot(edges, edges * dense / unit, color=GREY, ls="--", label="dense")
    axes.plot(edges, total / unit, color=RED, label=config.method["name"])
    axes.fill_between(edges, total / unit, edges * dense / unit, color=RED, alpha=0.08, lw=0)
    axes.set_ylim(bottom=0)
    saving = estimate.json["saved"]["model"]  # exact, where the line goes by samples
    axes.legend(loc="upper left", title=f"{saving:.1%} saved", alignment="left")
