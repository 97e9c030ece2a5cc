"""The picture of a study: loss over FLOPs, and every arm's differences from the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from est_ds.report import style
from est_ds.report.labels import Label, place_labels
from est_ds.report.style import BLACK, BLUE, GREY, ORANGE, RED
from est_ds.studies.arms import ArmAnswer, Compared
from est_ds.studies.snapshot import Snapshot
from est_ds.studies.text import BUDGETS

COLOURS = {"pays": BLUE, "costs": RED, "undecided": ORANGE}
WIDEST = 1.5  # nats: what is further off is out of sight


def write_study_figure(snapshot: Snapshot, file: Path) -> Path:
    """Draws a study into `file`.

    Raises:
        UserError: the file's ending names no picture format, or it cannot be written.
    """
    return style.write_figure(study_figure(snapshot), file)


@style.styled()
def study_figure(snapshot: Snapshot) -> Figure:
    """Two plots: ends of runs over FLOPs; differences at the budget that gives the verdict."""
    compared = _compared(snapshot)
    figure = Figure(figsize=(9.6, max(3.6, 1.2 + 0.2 * len(compared))), layout="constrained")
    ends, differences = figure.subplots(1, 2)
    labels, curve = _draw_ends(ends, snapshot)
    _draw_differences(differences, snapshot, compared)
    place_labels(figure, ends, labels, np.array(curve))
    return figure


def _compared(snapshot: Snapshot) -> list[tuple[ArmAnswer, Compared]]:
    """Arms that can be compared at the budget that gives the verdict, the best first."""
    decides = snapshot.answers.decides
    found = [
        (arm, arm.budgets[decides])
        for arm in snapshot.answers.arms[1:]
        if decides in arm.budgets and arm.budgets[decides].difference
    ]
    return sorted(found, key=lambda pair: pair[1].difference.interval.mean)


def _draw_ends(axes: Axes, snapshot: Snapshot) -> tuple[list[Label], list[tuple[float, float]]]:
    """Every mean over the seeds, of the baseline at several budgets.

    Returns:
        The names of the arms, which are not written yet, and the points of the baseline.
    """
    axes.set_title("Loss at the end of a run")
    axes.set_xlabel(f"model FLOPs, over those of {snapshot.baseline.name}")
    axes.set_ylabel("held-out loss, nats a token")
    run = snapshot.run(snapshot.baseline)
    if run is None:
        return [], []
    dense = [r for r in snapshot.answers.dense if r.loss is not None]
    by_cost: dict[float, dict[int, float]] = {}
    for result in dense:
        by_cost.setdefault(result.flops / run.flops.model, {})[result.seed] = result.loss
    # Seeds differ more than arms do: a mean over other seeds than its neighbour's would mislead.
    shared = set.intersection(*(set(losses) for losses in by_cost.values())) if by_cost else set()
    curve = [(cost, _mean(losses, shared)) for cost, losses in sorted(by_cost.items())]
    if curve:
        axes.plot(*zip(*curve), color=BLACK, marker="o", ms=3, label=snapshot.baseline.name)
    labels = []
    for arm in snapshot.answers.arms[1:]:
        if not arm.losses:
            continue
        loss = _mean(arm.losses, shared)
        colour = _colour(arm.budgets.get(snapshot.answers.decides))
        axes.plot(arm.flops_ratio, loss, "o", color=colour, ms=4)
        labels.append(Label(arm.name, arm.flops_ratio, loss, colour))
    axes.legend(loc="upper right")
    return labels, curve


def _draw_differences(
    axes: Axes, snapshot: Snapshot, compared: list[tuple[ArmAnswer, Compared]]
) -> None:
    """A row for each arm: seeds, and where there are several their mean with its interval."""
    answers = snapshot.answers
    axes.set_title(f"Difference from {snapshot.baseline.name} at equal {BUDGETS[answers.decides]}")
    axes.set_xlabel(
        "nats a token, left of 0 the arm is better\n"
        "95 % intervals of each arm alone; verdicts corrected (Holm)"
    )
    axes.axvline(0.0, color=BLACK, lw=0.8)
    for row, (arm, found) in enumerate(compared):
        pairs = list(snapshot.pairs(arm, found).values())
        colour, middle = _colour(found), found.difference.interval
        axes.plot(pairs, [row] * len(pairs), "o", color=colour, ms=3, mfc="none", mew=0.7)
        if middle.low is not None:
            axes.plot([middle.low, middle.high], [row, row], color=colour, lw=1.4)
            axes.plot(middle.mean, row, "o", color=colour, ms=4)
    axes.set_yticks(range(len(compared)), [arm.name for arm, _ in compared], fontsize=7)
    axes.set_ylim(len(compared) - 0.5, -0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -WIDEST), min(high, WIDEST))
    shown = {verdict for _, c in compared if (verdict := c.verdict) in COLOURS}
    for verdict in COLOURS:
        if verdict in shown:
            axes.plot([], [], "o", color=COLOURS[verdict], ms=4, label=verdict)
    axes.plot([], [], "o", color=GREY, mfc="none", ms=3, label="no verdict; a seed")
    axes.legend(loc="best")


def _mean(losses: Mapping[int, float], shared: set[int]) -> float:
    """Over the seeds that all have, or over what is there."""
    return mean([losses[seed] for seed in losses.keys() & shared] or losses.values())


def _colour(compared: Compared | None) -> str:
    return COLOURS.get(compared.verdict or "", GREY) if compared else GREY
