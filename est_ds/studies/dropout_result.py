"""What `est-ds analyse dropout` found, in sentences and a figure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from est_ds.analysis.output import Result
from est_ds.checkpoints.store import tag_of
from est_ds.report import style
from est_ds.report.style import BLUE, GREY, ORANGE, RED, SKY
from est_ds.studies.statistics import Interval
from est_ds.studies.text import interval_text


def dropout_result(numbers: dict[str, Any]) -> Result:
    """Of a study, at one run's weights."""
    run = Path(numbers["run"])
    return Result(
        name=f"dropout_{run.parent.name}_{run.name}_{tag_of(numbers['step'])}",
        title=f"Draws of gradients at {run.parent.name}/{run.name} after {numbers['step']:,} steps",
        numbers=numbers,
        said=(_measured_said(numbers), *_compared_said(numbers), *_phases_said(numbers)),
        figure=_figure(numbers),
    )


def _measured_said(numbers: dict[str, Any]) -> str:
    at = f"the weights of {numbers['run']} after {numbers['step']:,} steps"
    if not numbers["step"]:
        at = f"the weights that {numbers['run']} begins with"
    spread = numbers["spread_of_batches"]
    by_batch = "" if spread is None else f" Between batches alone it has the variance {spread:.3g}."
    left = "; ".join(f"{name}: {why}" for name, why in numbers["left_out"].items())
    return (
        f"Measured at {at}, on {numbers['batches']} global batches of {numbers['sequences']} "
        f"sequences of training, by {numbers['draws']} draws of every phase. Biases, variances and "
        f"their standard errors are relative to the size of the full model's gradient (variances "
        f"to its square).{by_batch}" + (f" Left out: {left}." if left else "")
    )


def _compared_said(numbers: dict[str, Any]) -> Iterator[str]:
    """The study's own answers."""
    yield numbers["headline"] or (
        f"No run of the study is done yet: est-ds compare trains them ({numbers['study']})."
    )
    for pair in numbers["alike"]:
        if found := pair["difference"]:
            interval = Interval(**found["interval"])
            yield (
                f"{pair['arm']} ends {interval_text(interval)} nats a token from {pair['like']} "
                f"({found['pairs']} seeds)."
            )
    yield from (found["said"] for found in numbers["compare"]["downstream"].values())
    for name, sides in numbers["boundaries"].items():
        for side in sides:
            full, drawn = side["losses"]["full_loss"], side["losses"]["subnetwork_loss"]
            yield (
                f"{name}, boundary before step {side['step']}: held-out loss of the subnetworks "
                f"less the full model's {drawn[0] - full[0]:+.4f} before and "
                f"{drawn[1] - full[1]:+.4f} after ({side['seeds']} seeds)."
            )


def _phases_said(numbers: dict[str, Any]) -> Iterator[str]:
    for name, found in _rows(numbers):
        gradient = found["gradient"]
        bare = found["regularisation_without_scale"]
        unscaled = "" if bare is None else f" (without rescaling {_text(bare, '+.4f')})"
        yield (
            f"{name}: bias {gradient['bias']:.3f} (its square {_text(gradient['bias_squared'])}), "
            f"cosine {_text(gradient['cosine'])}, variance {_text(gradient['variance'])}; loss of "
            f"the draws less the full model's {_text(found['regularisation'], '+.4f')}{unscaled}."
        )
    for pair in numbers["alike"]:
        here, there = (numbers["arms"].get(pair[key], []) for key in ("arm", "like"))
        for one, other in zip(here, there):
            if not (unit := other["gradient"]["variance"]["value"]):
                continue  # nothing is drawn anew
            ratio = one["gradient"]["variance"]["value"] / unit
            yield (
                f"{pair['arm']}, {one['phase']}: {ratio:.3g} times the variance of {pair['like']} "
                f"(micro-batches a step: {one['micro_batches']} and {other['micro_batches']})."
            )


def _text(estimate: dict[str, float], form: str = ".3g") -> str:
    return f"{estimate['value']:{form}} +- {estimate['standard_error']:.2g}"


def _rows(numbers: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Phases of arms, with what they are called."""
    for name, phases in numbers["arms"].items():
        for found in phases:
            yield name if len(phases) == 1 else f"{name}, {found['phase']}", found


@style.styled()
def _figure(numbers: dict[str, Any]) -> Figure:
    rows = dict(_rows(numbers))
    figure = Figure(figsize=(7.6, 1.4 + 0.3 * len(rows)), layout="constrained")
    variance, excess = figure.subplots(1, 2, sharey=True)
    found = list(rows.values())
    _points(variance, [r["gradient"]["variance"] for r in found], (BLUE, "variance of the draws"))
    _points(variance, [r["gradient"]["bias_squared"] for r in found], (RED, "squared bias"), 0.2)
    if numbers["spread_of_batches"] is not None:
        variance.axvline(
            numbers["spread_of_batches"], color=GREY, lw=1, ls="--", label="between batches"
        )
    variance.set_title("Gradient")
    variance.set_xlabel("over the square of the full model's")
    variance.set_yticks(range(len(rows)), list(rows))
    variance.invert_yaxis()
    _points(excess, [r["regularisation"] for r in found], (BLUE, "as trained"))
    bare = [r["regularisation_without_scale"] for r in found]
    _points(excess, bare, (ORANGE, "without rescaling"), 0.2)
    excess.axvline(0.0, color=SKY, lw=1)
    excess.set_title("Loss of the draws less the full model's")
    excess.set_xlabel("nats per token")
    for axes in (variance, excess):
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=2)
    return figure


def _points(
    axes: Axes, each: list[dict[str, float] | None], look: tuple[str, str], below: float = 0.0
) -> None:
    """Values with bars of two standard errors, a row each.

    Args:
        look: colour and label.
        below: how far from the middle of its row a value is drawn.
    """
    known = [(i + below, e["value"], 2 * e["standard_error"]) for i, e in enumerate(each) if e]
    if known:
        at, values, errors = zip(*known)
        line = {"color": look[0], "label": look[1], "marker": "o", "ms": 4, "lw": 0}
        axes.errorbar(values, at, xerr=errors, elinewidth=1, **line)
