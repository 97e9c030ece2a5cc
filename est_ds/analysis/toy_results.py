"""What the toys measured, in sentences and figures."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from scipy.stats import spearmanr

from est_ds.analysis.output import Result
from est_ds.analysis.toys import DENSE, EST, WIDTH, cost, train
from est_ds.report import style
from est_ds.report.style import BLACK, BLUE, GREEN, GREY, ORANGE, RED

COLOURS = {"residual and norm": BLUE, "residual alone": RED, "norm alone": GREEN}
TOY_STEPS = 1000
DASHES = ("-", "--", ":", "-.")


def linear_result(numbers: dict[str, Any]) -> Result:
    """The linear residual networks."""
    said = [
        f"Linear networks of width {numbers['width']}, means over {numbers['samples']} points of "
        f"the unit sphere, depths {', '.join(map(str, numbers['depths']))}: powers of the depth by "
        f"which the mean of Psi / |F| goes."
    ]
    for found in numbers["networks"]:
        limit = found["limit_rate"]
        known = [e for e in found["expected"] if e is not None]
        far = [abs(m / e - 1) for m, e in zip(found["mean_psi_over_norm"], known)]
        said.append(
            f"{found['layers'].capitalize()}, tau {found['tau']:g}: {found['rate']:+.2f}"
            + (f" (limit {limit:+.2g})" if limit is not None else "")
            + (f", within {max(far):.0%} of a large width's values" if far else "")
            + "."
        )
    return Result(
        name="linear",
        title="Linear residual networks",
        numbers=numbers,
        said=tuple(said),
        figure=_linear(numbers),
    )


@style.styled()
def _linear(numbers: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    norms, psi, means = figure.subplots(1, 3)
    depths = numbers["depths"]
    taus = list(dict.fromkeys(found["tau"] for found in numbers["networks"]))
    for found in numbers["networks"]:
        dash = DASHES[taus.index(found["tau"]) % len(DASHES)]
        line = {"color": COLOURS[found["layers"]], "ls": dash, "lw": 1.2}
        norms.plot(range(depths[-1] + 1), found["norms"], **line)
        psi.plot(range(1, depths[-1] + 1), found["psi_over_first"], **line)
        name = f"{found['layers']}, {found['tau']:g}"
        means.plot(depths, found["mean_psi_over_norm"], marker="o", ms=3, label=name, **line)
        known = [(d, e) for d, e in zip(depths, found["expected"]) if e is not None]
        means.plot(*zip(*known), ls="", marker="x", color=BLACK, ms=4) if known else None
    for axes, title, label in (
        (norms, f"Norm, depth {depths[-1]}", "layer"),
        (psi, r"$\Psi_l\,/\,\Psi_1$", "layer"),
        (means, r"Mean $\Psi\,/\,|F|$", "depth"),
    ):
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.set_yscale("log")
    means.set_xscale("log")
    means.set_xticks(depths)
    means.xaxis.set_major_formatter(ScalarFormatter())
    means.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=3, title="layers, tau (crosses: expected)")
    return figure


def measure_toy(seeds: Iterable[int]) -> dict[str, Any]:
    """Returns the held-out errors of EST, and of dense training at equal steps and FLOPs."""
    began, arms, seeds = time.monotonic(), {}, list(seeds)
    share = cost(EST, TOY_STEPS) / TOY_STEPS
    for name, phases, steps in (
        ("dense", DENSE, TOY_STEPS),
        ("EST", EST, TOY_STEPS),
        ("dense, EST's FLOPs", DENSE, round(share * TOY_STEPS)),
    ):
        errors = [train(phases, steps, seed) for seed in seeds]
        last = np.array(errors)[:, -1]
        spread = float(last.std(ddof=1) / len(last) ** 0.5) if len(last) > 1 else None
        mean = float(last.mean())
        arms[name] = {"steps": steps, "errors": errors, "mean": mean, "standard_error": spread}
    return {
        "steps": TOY_STEPS,
        "width": WIDTH,
        "seeds": seeds,
        "phases": EST,
        "cost": share,
        "arms": arms,
        "seconds": time.monotonic() - began,
    }


def toy_result(numbers: dict[str, Any]) -> Result:
    """EST on the two-layer perceptron."""
    said = [
        f"A perceptron of {numbers['width']} hidden units, {numbers['steps']} steps, seeds "
        f"{', '.join(map(str, numbers['seeds']))}: EST takes {numbers['cost']:.0%} of "
        f"the dense run's FLOPs."
    ]
    for name, arm in numbers["arms"].items():
        error = arm["standard_error"]
        spread = "" if error is None else f" (standard error {error:.2g})"
        said.append(f"{name}: held-out error {arm['mean']:.4f}{spread} after {arm['steps']} steps.")
    return Result(
        name="toy",
        title="EST on a two-layer perceptron",
        numbers=numbers,
        said=tuple(said),
        figure=_toy(numbers),
    )


@style.styled()
def _toy(numbers: dict[str, Any]) -> Figure:
    figure, axes = style.new_figure("EST on a two-layer perceptron", "held-out error")
    for (name, arm), colour in zip(numbers["arms"].items(), (GREY, ORANGE, BLUE)):
        errors = np.array(arm["errors"])
        at = arm["steps"] * np.arange(1, errors.shape[1] + 1) / errors.shape[1]
        axes.plot(at, errors.T, color=colour, lw=0.7, alpha=0.5)
        axes.plot(at, errors.mean(0), color=colour, marker="o", ms=3, label=name)
    for until, _ in numbers["phases"][:-1]:
        axes.axvline(until * numbers["steps"], color=GREY, lw=0.7, ls=(0, (2, 2)))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.legend(loc="upper right")
    return figure


def polynomial_result(numbers: dict[str, Any]) -> Result:
    """Dense, RaPTr and PLD on a polynomial."""
    seeds, half = ", ".join(map(str, numbers["seeds"])), numbers["degrees"] // 2
    said = [
        f"A residual network of {numbers['layers']} layers and width {numbers['width']} on "
        f"polynomials of degrees 1 to {numbers['degrees']}, {numbers['steps']} steps, seed {seeds}."
    ]
    for name, arm in numbers["arms"].items():
        low, high = np.mean(arm["errors"][:half]), np.mean(arm["errors"][half:])
        said.append(
            f"{name} ran {arm['layers_run']:.1%} of the layers: error {arm['loss']:.4f}, "
            f"of degrees to {half} {low:.3f} and above {high:.3f} of what there is to learn; "
            f"{_order(arm['learned_after'])}."
        )
    errors = {name: np.mean(arm["errors"][half:]) for name, arm in numbers["arms"].items()}
    worse = "worse" if errors["PLD"] > errors["RaPTr"] else "not worse"
    said.append(
        f"At the high degrees PLD is {worse} than RaPTr here ({len(numbers['seeds'])} "
        f"{'seed' if len(numbers['seeds']) == 1 else 'seeds'})."
    )
    return Result(
        name="polynomial",
        title="Polynomials by degree",
        numbers=numbers,
        said=tuple(said),
        figure=_polynomial(numbers),
    )


def _order(learned: list[int | None]) -> str:
    """After how many steps each degree was learned, and whether low ones came first."""
    steps = ", ".join("never" if step is None else str(step) for step in learned)
    late = [float("inf") if step is None else step for step in learned]
    if len(set(late)) == 1:
        return f"degrees are learned to a half after {steps} steps"
    correlation = spearmanr(range(len(late)), late).statistic
    return (
        f"degrees are learned to a half after {steps} steps, a rank correlation with the degree of "
        f"{correlation:+.2f}"
    )


@style.styled()
def _polynomial(numbers: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    arms = numbers["arms"]
    every = figure.subplots(1, len(arms) + 1)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, numbers["degrees"]))
    for axes, (name, arm), dash in zip(every[1:], arms.items(), DASHES):
        done = arm["runs"][0]["done"]
        losses = np.mean([run["loss"] for run in arm["runs"]], axis=0)
        every[0].plot(done, losses, color=BLACK, ls=dash, label=name)
        errors = np.mean([run["errors"] for run in arm["runs"]], axis=0)
        for degree, colour in enumerate(colours):
            axes.plot(done, errors[:, degree], color=colour, lw=1.2, label=str(degree + 1))
        axes.set_title(name)
        axes.set_ylim(0, 1.2)
    every[0].set_title("Error")
    every[0].set_yscale("log")
    every[0].legend(loc="best")
    every[1].set_ylabel("error of a degree")
    for axes in every:
        axes.set_xlabel("steps")
    handles = every[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=numbers["degrees"], title="degree")
    return figure
