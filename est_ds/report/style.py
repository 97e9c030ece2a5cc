"""How all figures look: quiet axes, colours that survive printing and colour blindness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
# `pyplot` comes after the backend is chosen, which then needs no display.
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

from est_ds.plans.phases import Phase  # noqa: E402

# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#666666"
PHASE_SHADES = ("#eef2f6", "#ffffff")
SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#d8dde3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "figure.dpi": 110,
    "svg.fonttype": "path",
    "svg.hashsalt": "est_ds",
}


def new_figure(title: str, ylabel: str, *, height: float = 3.2) -> tuple[Any, Any]:
    """A figure of page width with one plot over optimizer steps."""
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(7.6, height), layout="constrained")
    dress(axes, title, ylabel)
    return figure, axes


def dress(axes: Any, title: str, ylabel: str) -> None:
    axes.set_title(title, pad=18)
    axes.set_ylabel(ylabel)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def shade_phases(axes: Any, phases: Sequence[Phase], until: int) -> None:
    """Shades every other phase up to step `until` and names those wide enough to hold a name."""
    axes.set_xlim(0, until)
    axes.grid(False, axis="x")
    for i, phase in enumerate(p for p in phases if p.from_step < until):
        end = min(phase.until_step, until)
        axes.axvspan(phase.from_step, end, color=PHASE_SHADES[i % 2], lw=0, zorder=-2)
        if phase.from_step:
            axes.axvline(phase.from_step, color=GREY, lw=0.7, ls=(0, (2, 2)), zorder=-1)
        # A letter is about 0.9 % of the plot's width.
        if (end - phase.from_step) / until > 0.009 * len(phase.name):
            axes.annotate(
                phase.name,
                ((phase.from_step + end) / 2, 1.0),
                (0, 3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
                color=GREY,
                parse_math=False,
            )
