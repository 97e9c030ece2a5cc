"""How all figures look: quiet axes, colours that survive printing and colour blindness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from est_ds.errors import UserError
from est_ds.plans.phases import Phase

# Okabe and Ito's palette.
BLUE, SKY, ORANGE, GREEN, RED = "#0072b2", "#8fc7ee", "#e69f00", "#009e73", "#d55e00"
BLACK, GREY = "#222222", "#666666"
# Of a phase's name, as a fraction of a plot's width.
LETTER_WIDTH = 0.01
STEPS = "optimizer steps done"
PHASE_SHADES = ("#ffffff", "#eef2f6")
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


def styled() -> AbstractContextManager:
    """The settings, as a context or as a decorator.

    Figures are made without pyplot: no display, no state shared with the caller.
    """
    return matplotlib.rc_context(SETTINGS)


def new_figure(title: str, ylabel: str, *, height: float = 3.2) -> tuple[Figure, Axes]:
    """A figure of page width with one plot over optimizer steps; call it while `styled`."""
    # Fixed margins, so that the steps of all figures of a page stand under each other.
    figure = Figure(figsize=(7.6, height))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.09, right=0.985, bottom=0.46 / height, top=1 - 0.46 / height)
    dress(axes, title, ylabel)
    return figure, axes


def dress(axes: Axes, title: str, ylabel: str) -> None:
    """Title and axes of a plot over optimizer steps."""
    axes.set_title(title, pad=20, parse_math=False)
    axes.set_ylabel(ylabel)
    axes.set_xlabel(STEPS)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def write_figure(figure: Figure, file: Path) -> Path:
    """Writes a picture into `file`, in the format that its ending names.

    Raises:
        UserError: the ending names no picture format, or the file cannot be written.
    """
    check_ending(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    except OSError as e:
        raise UserError(
            f"plot file {str(file)!r} cannot be written: {e.strerror or e}; give a path in a "
            f"folder that you may write to."
        ) from None
    return file


def check_ending(file: Path) -> None:
    """Refuses a file whose ending names no picture format.

    Raises:
        UserError: as said.
    """
    known = sorted(Figure().canvas.get_supported_filetypes())
    if file.suffix.lower().lstrip(".") not in known:
        raise UserError(
            f"plot file {str(file)!r}: the ending {file.suffix!r} is no picture format; use "
            f"one of {', '.join('.' + name for name in known)}."
        )


def power_of_thousand(largest: float) -> tuple[float, str]:
    """A unit for an axis that reaches `largest`: 1e12 and its text, say."""
    exponent = 3 * (math.floor(math.log10(largest)) // 3) if largest > 0 else 0
    return 10.0**exponent, f"$10^{{{exponent}}}$"


def shade_phases(
    axes: Axes, phases: Sequence[Phase], until: int, notes: Sequence[str] | None = None
) -> None:
    """Shades every other phase up to step `until` and names those wide enough to hold a name.

    Args:
        notes: what stands behind the name of each phase that has begun, where there is room.
    """
    first = phases[0].from_step
    axes.set_xlim(first, until)
    axes.grid(False, axis="x")
    for i, phase in enumerate(p for p in phases if p.from_step < until):
        end = min(phase.until_step, until)
        axes.axvspan(phase.from_step, end, color=PHASE_SHADES[i % 2], lw=0, zorder=-2)
        if phase.from_step > first:
            axes.axvline(phase.from_step, color=GREY, lw=0.7, ls=(0, (2, 2)), zorder=-1)
        texts = [phase.name] if notes is None else [f"{phase.name}: {notes[i]}", notes[i]]
        share = (end - phase.from_step) / (until - first)
        fitting = [t for t in texts if LETTER_WIDTH * len(t) < share]
        if fitting:
            axes.annotate(
                fitting[0],
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
