"""What was measured on a run, in sentences and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from est_ds.analysis.output import Result
from est_ds.checkpoints.store import tag_of
from est_ds.errors import gigabytes
from est_ds.plans.phases import Phase
from est_ds.report import style
from est_ds.report.style import BLUE, GREEN, GREY, ORANGE, RED, SKY


def hessian_result(numbers: dict[str, Any]) -> Result:
    """Of one checkpoint."""
    step, groups = numbers["step"], numbers["by_layer"]
    return Result(
        name=f"hessian_{tag_of(step)}",
        title=f"Hessian of the held-out loss after {step:,} steps",
        numbers=numbers,
        said=(*_trace_said(numbers), *_eigenvalue_said(numbers), _effort_said(numbers)),
        figure=_bars(groups, f"Hessian trace after {step:,} steps"),
    )


def _trace_said(numbers: dict[str, Any]) -> tuple[str, ...]:
    trace, error = numbers["trace"], numbers["standard_error"]
    groups = numbers["by_layer"]
    largest = max(groups, key=lambda name: groups[name]["trace"])
    share = error / abs(trace) if trace else float("inf")
    said = [
        f"After {numbers['step']:,} steps the Hessian of the full model's held-out loss "
        f"({numbers['loss']:.4f} nats per token) has the trace {trace:.4g}, standard error "
        f"{error:.2g} ({share:.1%}) from {numbers['samples']} samples; bars are two standard "
        f"errors.",
        f"The largest part of it, {groups[largest]['trace']:.4g}, is of {largest}.",
    ]
    if not numbers["reached"]:
        said.append(
            f"The wanted standard error of {numbers['wanted_error']:.1%} was not reached: raise "
            f"--samples."
        )
    return tuple(said)


def _eigenvalue_said(numbers: dict[str, Any]) -> tuple[str, ...]:
    value = numbers["largest_eigenvalue"]
    if value is not None:
        return (f"The largest eigenvalue is {value:.4g}.",)
    if numbers["eigenvalue_wanted"]:
        return ("The largest eigenvalue did not converge.",)
    return ()


def _effort_said(numbers: dict[str, Any]) -> str:
    memory = numbers["memory"]
    return (
        f"{numbers['windows']} windows of each held-out corpus, "
        f"{numbers['parameters'] / 1e6:,.3g} M parameters, {numbers['seconds']:,.0f} s in "
        f"{numbers['processes']} {'process' if numbers['processes'] == 1 else 'processes'}; a "
        f"process holds four vectors of the parameters ({gigabytes(memory['vectors_bytes'])}) and "
        f"the activations of a micro-batch, and held {gigabytes(memory['peak_bytes'])} at most."
    )


@style.styled()
def _bars(groups: dict[str, dict[str, float]], title: str) -> Figure:
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(groups))
    axes.bar(
        places,
        [group["trace"] for group in groups.values()],
        yerr=[2 * group["standard_error"] for group in groups.values()],
        color=SKY,
        ecolor=GREY,
        capsize=2,
    )
    axes.set_xticks(places, [n.removeprefix("layer ") for n in groups])
    axes.set_xlabel("layer")
    axes.set_ylabel("trace of its block")
    axes.grid(False, axis="x")
    axes.set_title(title)
    return figure


@dataclass(frozen=True)
class Along:
    """A run's checkpoints.

    Attributes:
        each: numbers of those that were measured, two or more, by step.
        damaged: steps of those that are damaged.
        phases: of the run.
        steps: of the run.
    """

    each: tuple[dict[str, Any], ...]
    damaged: tuple[int, ...]
    phases: tuple[Phase, ...]
    steps: int


def along_result(along: Along) -> Result:
    """Of all checkpoints of a run."""
    each = along.each
    first, last = each[0], each[-1]
    change = last["trace"] - first["trace"]
    error = (first["standard_error"] ** 2 + last["standard_error"] ** 2) ** 0.5
    said = [
        f"Trace of the Hessian of the full model's held-out loss at {len(each)} checkpoints: "
        f"{first['trace']:.4g} after {first['step']:,} steps, {last['trace']:.4g} after "
        f"{last['step']:,} (difference {change:.3g}, standard error at most {error:.2g}); bars are "
        f"two standard errors.",
    ]
    if missed := [n["step"] for n in each if not n["reached"]]:
        said.append(
            f"After {', '.join(map(str, missed))} steps the wanted standard error was not "
            f"reached: raise --samples."
        )
    if along.damaged:
        said.append(
            f"Left out, because they are damaged: the checkpoints after "
            f"{', '.join(map(str, along.damaged))} steps."
        )
    said.append(_effort_said({**last, "seconds": sum(n["seconds"] for n in each)}))
    return Result(
        name="hessian_along",
        title="Hessian of the held-out loss along the run",
        numbers={"checkpoints": list(each), "damaged": list(along.damaged)},
        said=tuple(said),
        figure=_along(along),
    )


@style.styled()
def _along(along: Along) -> Figure:
    each = along.each
    figure, axes = style.new_figure("Hessian of the held-out loss", "trace")
    figure.subplots_adjust(right=0.91)
    done = [n["step"] for n in each]
    axes.errorbar(
        done,
        [n["trace"] for n in each],
        [2 * n["standard_error"] for n in each],
        color=BLUE,
        marker="o",
        ms=4,
        capsize=2,
        label="trace",
    )
    known = [n for n in each if n["largest_eigenvalue"] is not None]
    if known:
        other = axes.twinx()
        other.grid(False)
        other.spines["right"].set_visible(True)
        other.set_ylabel("largest eigenvalue", color=ORANGE)
        values = [n["largest_eigenvalue"] for n in known]
        other.plot([n["step"] for n in known], values, color=ORANGE, marker="s", ms=4, ls="--")
    style.shade_phases(axes, along.phases, along.steps)
    axes.legend(loc="best")
    return figure


def stability_result(numbers: dict[str, Any]) -> Result:
    """Norms, Psi and losses of one checkpoint."""
    step = numbers["step"]
    return Result(
        name=f"stability_{tag_of(step)}",
        title=f"Stability after {step:,} steps",
        numbers=numbers,
        said=tuple(_stability_said(numbers)),
        figure=_stability(numbers),
    )


def _stability_said(numbers: dict[str, Any]) -> list[str]:
    gap = numbers["gap"]
    error = f", standard error {gap['standard_error']:.2g}" if gap["standard_error"] else ""
    said = [
        f"After {numbers['step']:,} steps the full model's held-out loss is {numbers['loss']:.4f} "
        f"nats per token, and {gap['mean']:+.4f} against the mean without one layer{error} "
        f"({numbers['windows']} windows of each held-out corpus)."
    ]
    for name, stack in numbers["stacks"].items():
        worst = min(stack["layers"], key=lambda layer: layer["gap"])
        said.append(
            f"{name.capitalize()}: the residual state's norm goes from {stack['norms'][0]:.3g} to "
            f"{stack['norms'][-1]:.3g} over {len(stack['layers'])} layers, the mean of Psi / |F| "
            f"is {stack['mean_psi_over_norm']:.3g}; the loss misses layer {worst['layer']} most "
            f"({-worst['gap']:+.4f})."
        )
    sides = numbers["boundaries"]
    for before, after in zip(sides[::2], sides[1::2]):
        said.append(
            f"Boundary before step {after['step']}, {before['phase']} to {after['phase']}: "
            f"subnetworks' loss {before['subnetwork_loss']:.4f} to "
            f"{after['subnetwork_loss']:.4f}, full model's {before['full_loss']:.4f} to "
            f"{after['full_loss']:.4f}."
        )
    if not sides:
        said.append(
            "The run recorded no losses at phase boundaries (evaluate.boundaries=true does)."
        )
    return said


@style.styled()
def _stability(numbers: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7.6, 5.6), layout="constrained")
    ((norms, psi), (relative, losses)) = figure.subplots(2, 2)
    for (name, stack), colour in zip(numbers["stacks"].items(), (BLUE, GREEN)):
        first = stack["layers"][0]["layer"]
        at = [layer["layer"] for layer in stack["layers"]]
        line = {"color": colour, "marker": "o", "ms": 3, "label": name}
        norms.plot(range(first, first + len(stack["norms"])), stack["norms"], **line)
        _over(psi, at, [layer["psi_over_first"] for layer in stack["layers"]], **line)
        _over(relative, at, [layer["psi_over_norm"] for layer in stack["layers"]], **line)
        line["label"] = "without the layer" if name == "model" else f"without, {name}"
        _over(losses, at, [layer["loss_without"] for layer in stack["layers"]], **line)
    losses.axhline(numbers["loss"], color=RED, lw=1, ls="--", label="full model")
    for axes, title, label in (
        (norms, "Residual state", "norm, mean over positions"),
        (psi, "Without one layer", r"$\Psi_l\,/\,\Psi$ of the first layer"),
        (relative, "Against the last state", r"$\Psi_l\,/\,|F|$"),
        (losses, "Held-out loss without a layer", "nats per token"),
    ):
        axes.set_title(title)
        axes.set_ylabel(label)
        axes.set_xlabel("layers before it" if axes is norms else "layer")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if axes is losses or len(numbers["stacks"]) > 1:
            axes.legend(loc="best")
    return figure


def _over(axes: Axes, at: list[int], values: list[float | None], **line: Any) -> None:
    axes.plot(at, [float("nan") if v is None else v for v in values], **line)
