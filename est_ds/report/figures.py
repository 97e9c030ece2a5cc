"""The figures of a run, from the lines of its metrics."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from est_ds.report import style
from est_ds.report.files import RunFiles
from est_ds.report.style import BLACK, BLUE, GREEN, GREY, ORANGE, RED
from est_ds.report.summary import Summary
from est_ds.report.text import seconds

# Beyond this many points a line on paper looks the same, and a page grows heavy.
MAX_POINTS = 2000
PHASE_COLOURS = (BLUE, ORANGE, GREEN, RED, "#cc79a7", "#56b4e9")


@style.styled()
def loss_figure(run: RunFiles, summary: Summary) -> Figure:
    """Training loss of the subnetworks, held-out loss, unigram entropy."""
    figure, axes = style.new_figure("Loss", "nats per token", height=3.6)
    done, losses = _done(run.steps), _column(run, "loss")
    shown = _thinned(len(done))
    smooth = running_median(losses)
    axes.plot(done[shown], losses[shown], color=BLUE, lw=0.8, alpha=0.35)
    axes.plot(done[shown], smooth[shown], color=BLUE, label="training (active subnetwork)")
    if run.evaluations:
        held_out = [e["eval_loss"] for e in run.evaluations]
        at = _done(run.evaluations)
        depths = {run.method.depth(e["step"]) for e in run.evaluations}
        model = "full model" if depths == {summary.num_layers} else "as deep as it was then"
        axes.plot(at, held_out, color=RED, marker="o", ms=4, label=f"held-out ({model})")
        for name, colour in zip(summary.eval_losses, itertools.cycle(PHASE_COLOURS[1:])):
            values = [e.get("eval_losses", {}).get(name, np.nan) for e in run.evaluations]
            axes.plot(at, values, color=colour, lw=1, ls=(0, (2, 2)), label=f"held-out: {name}")
    if summary.valid_entropy is not None:
        label = f"unigram entropy, held-out: {summary.valid_entropy:.2f}"
        axes.axhline(summary.valid_entropy, color=BLACK, ls=(0, (5, 3)), lw=1, label=label)
    if losses.max() > 10 * losses.min() > 0:
        axes.set_yscale("log")
    style.shade_phases(axes, run.phases, summary.num_steps)
    axes.legend(loc="upper right")
    return figure


@style.styled()
def step_time_figure(run: RunFiles, summary: Summary) -> Figure:
    """Every logged step's time, grey where it is not compared, and the median of every phase."""
    figure, axes = style.new_figure("Step time", "seconds per step")
    times, done = _column(run, "step_s"), _done(run.steps)
    compared = np.array([entry["step"] in summary.timed.steps for entry in run.steps])
    shown = _thinned(len(done))
    colours = np.where(compared, [_colour(run, entry["step"]) for entry in run.steps], "#aaaaaa")
    # Points stay pixels in the vector file: thousands of them.
    many = len(shown) > 500
    axes.scatter(done[shown], times[shown], s=9, c=colours[shown], alpha=0.5, lw=0, rasterized=many)
    for phase in summary.phases:
        if phase.timing:
            colour, span = _colour(run, phase.from_step), [phase.from_step, phase.until_step]
            axes.plot(span, [phase.timing.median_s] * 2, color=colour, lw=2.2)
    top = 2.0 * max([p.timing.median_s for p in summary.phases if p.timing] or [times.max()])
    axes.set_ylim(0, min(top, 1.15 * max(times.max(), top / 2)))
    beyond = int((times > axes.get_ylim()[1]).sum())
    if beyond:
        noun = "step" if beyond == 1 else "steps"
        axes.set_xlabel(f"{style.STEPS} ({beyond} slower {noun} beyond the top, not drawn)")
    medians = [
        f"median {seconds(p.timing.median_s)}" if p.timing else "not timed" for p in summary.phases
    ]
    style.shade_phases(axes, run.phases, summary.num_steps, medians)
    return figure


@style.styled()
def flops_figure(run: RunFiles, summary: Summary) -> Figure:
    """Cumulative `model` FLOPs of the steps done, against dense training."""
    figure, axes = style.new_figure("FLOPs", "cumulative FLOPs")
    ends = _done(run.steps)
    x = np.append(run.config.first_step, ends)
    active, dense = (np.append(0, cumulative(run, f"flops_{of}")) for of in ("active", "dense"))
    shown = _thinned(len(active))
    unit, text = style.power_of_thousand(dense[-1])
    x, active, dense = x[shown], active[shown] / unit, dense[shown] / unit
    axes.set_ylabel(f"cumulative FLOPs, {text}")
    axes.plot(x, dense, color=GREY, ls="--", label="dense")
    axes.plot(x, active, color=RED, label=summary.method)
    axes.fill_between(x, active, dense, color=RED, alpha=0.08, lw=0)
    axes.set_ylim(bottom=0)
    style.shade_phases(axes, run.phases, summary.num_steps)
    axes.legend(loc="upper left", title=f"{summary.saved_model:.1%} saved", alignment="left")
    return figure


@style.styled()
def learning_rate_figure(run: RunFiles, summary: Summary) -> Figure:
    """The learning rate of every logged step."""
    figure, axes = style.new_figure("Learning rate", "learning rate", height=2.4)
    rates = _column(run, "lr")
    shown = _thinned(len(rates))
    unit, text = style.power_of_thousand(rates.max())
    axes.set_ylabel(f"learning rate, {text}")
    axes.plot(_done(run.steps)[shown], rates[shown] / unit, color=GREEN)
    axes.set_ylim(bottom=0)
    style.shade_phases(axes, run.phases, summary.num_steps)
    return figure


def cumulative(run: RunFiles, field: str) -> np.ndarray:
    """Sum of a field of single steps up to every training line, float64 [lines]; of a branch, since
    it began."""
    # A line stands for the steps since the line before it.
    return np.cumsum(np.diff(_done(run.steps), prepend=run.config.first_step) * _column(run, field))


def _column(run: RunFiles, field: str) -> np.ndarray:
    """A field of all training lines, float64 [lines]."""
    return np.array([entry[field] for entry in run.steps], dtype=np.float64)


def _done(lines: list[dict[str, Any]]) -> np.ndarray:
    """Steps done by every line, of training or of evaluation, int64 [lines]."""
    return np.array([entry["step"] + 1 for entry in lines])


def _colour(run: RunFiles, step: int) -> str:
    """That of the phase of a step."""
    return PHASE_COLOURS[run.method.phase_at(step) % len(PHASE_COLOURS)]


def _thinned(count: int) -> np.ndarray:
    """Indices of at most MAX_POINTS of `count` points, first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).astype(int))


def running_median(values: np.ndarray) -> np.ndarray:
    """Median over a fortieth of the values, at least five, fewer at both ends."""
    half = max(2, len(values) // 80)
    windows: list[Any] = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.median(window) for window in windows])
