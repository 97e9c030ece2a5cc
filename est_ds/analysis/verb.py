"""`est-ds analyse NAME`: what may be asked, and what is called. Loads no library until then."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from est_ds.config.arguments import natural, positive, seed, several

Name = Callable[[str, Callable, str, str], argparse.ArgumentParser]

SUMMARY = "measure what the papers measured, on a run or on a toy"


def add_analyse(analyse: argparse.ArgumentParser) -> Name:
    """Adds the measurements to the verb.

    Returns:
        What adds another one: word, function, help, description.
    """
    analyse.description = (
        "Measures what the papers measured. Numbers (JSON) and a figure (PNG) go into the folder "
        "analysis of RUN or STUDY, and into its page; of a toy into --out."
    )
    analyse.set_defaults(parser=analyse)
    names = analyse.add_subparsers(metavar="NAME", required=True)

    def name(word: str, function: Callable, help: str, description: str) -> argparse.ArgumentParser:
        sub = names.add_parser(word, help=help, description=description)
        sub.set_defaults(verb=function, parser=sub)
        sub.add_argument("--json", action="store_true", help="print JSON and nothing else")
        return sub

    hessian = name("hessian", _hessian, "the loss's curvature: trace, largest eigenvalue", HESSIAN)
    _add_run(hessian)
    _add_hessian(hessian)
    stability = name("stability", _stability, "what the model loses without one layer", STABILITY)
    _add_run(stability)
    _add_step(stability)
    linear = name("linear", _linear, "the same of deep linear networks; no run", LINEAR)
    _add_toy(linear)
    linear.add_argument(
        "--depths", type=several(positive), metavar="L,L", help="layers (default: 8 to 128)"
    )
    linear.add_argument(
        "--taus", type=several(float), metavar="T,T", help="shares in common (default: 0,0.5,1)"
    )
    polynomial = name(
        "polynomial",
        _polynomial,
        "what dense, RaPTr and PLD learn first, by degree; no run",
        POLY,
    )
    _add_toy(polynomial)
    for word, help in (
        ("--steps", "optimizer steps of every arm (default: 2000)"),
        ("--width", "width of the network (default: 64)"),
        ("--seeds", "networks and polynomials of every arm (default: 1)"),
    ):
        polynomial.add_argument(word, type=positive, metavar="N", help=help)
    toy = name("toy", _toy, "EST in one short file, on a two-layer perceptron; no run", TOY)
    _add_toy(toy)
    toy.add_argument("--seeds", type=positive, default=3, metavar="N", help="(default: 3)")
    return name


HESSIAN = (
    "Estimates the trace of the Hessian of the full model's mean held-out loss, in all and by "
    "layer (Hutchinson), and its largest eigenvalue (Lanczos). A process holds four vectors of the "
    "parameters, 16 bytes a parameter, and the activations of one micro-batch twice; the "
    "eigenvalue takes 80 bytes a parameter more in one process."
)
STABILITY = (
    "Measures the norms of residual states by depth, how far one layer moves the last of them "
    "(Psi), and the held-out loss without each layer; shows the losses that the run recorded at "
    "phase boundaries."
)
LINEAR = "Measures norms and Psi of deep linear networks with and without residuals and norms."
POLY = (
    "Trains a residual network of 20 layers on polynomials of degrees 1 to 10: dense, and with "
    "RaPTr and PLD at a fifth fewer FLOPs; says what is learned by degree."
)
TOY = "Trains a two-layer perceptron with EST and dense, at equal steps and at equal FLOPs."


def _add_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", metavar="RUN", help="a run file (YAML) or a run directory")
    sub.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.field=value",
        help="change a field of RUN",
    )
    sub.add_argument(
        "--windows",
        type=natural,
        default=16,
        metavar="N",
        help="held-out windows, of every held-out corpus (default: 16)",
    )


def _add_step(sub) -> None:
    sub.add_argument(
        "--step",
        default="latest",
        metavar="S",
        help="a step with a checkpoint, latest (default) or best",
    )


def _add_hessian(hessian: argparse.ArgumentParser) -> None:
    which = hessian.add_mutually_exclusive_group()
    _add_step(which)
    which.add_argument("--along", action="store_true", help="measure at every checkpoint")
    hessian.add_argument(
        "--samples",
        type=natural,
        default=100,
        metavar="N",
        help="take at most N random vectors (default: 100)",
    )
    hessian.add_argument(
        "--error",
        type=float,
        default=0.05,
        metavar="E",
        help="stop when the standard error is this part of the trace (default: 0.05)",
    )
    hessian.add_argument(
        "--processes",
        type=positive,
        default=1,
        metavar="N",
        help="take samples in N processes of this machine; the result is the same (default: 1)",
    )
    hessian.add_argument(
        "--seed", type=seed, default=0, metavar="S", help="of the random vectors (default: 0)"
    )
    hessian.add_argument(
        "--skip-eigenvalue", action="store_true", help="leave the largest eigenvalue out"
    )


def _add_toy(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("runs/analysis"),
        metavar="FOLDER",
        help="write figure and numbers there (default: runs/analysis)",
    )
    sub.add_argument("--seed", type=seed, default=0, metavar="S", help="(default: 0)")


def _hessian(parsed: argparse.Namespace, arguments: list[str]) -> None:
    from est_ds.analysis.hessian import Effort, measure_hessian
    from est_ds.analysis.output import check_folder, of_run
    from est_ds.analysis.results import hessian_result
    from est_ds.analysis.subject import checkpoints_of

    wanted = _wanted(parsed)
    effort = Effort(
        samples=parsed.samples,
        error=parsed.error,
        processes=parsed.processes,
        seed=parsed.seed,
        eigenvalue=not parsed.skip_eigenvalue,
    )
    effort.check()
    design, steps = checkpoints_of(wanted)
    folder = of_run(Path(design.config.run_dir))
    check_folder(folder)
    if parsed.along:
        _along(design, steps, (wanted, effort), parsed)
    else:
        give(hessian_result(measure_hessian(wanted, effort)), folder, parsed)


def _along(design, steps: list[int], asked: tuple, parsed: argparse.Namespace) -> None:
    """Measures the Hessian at every checkpoint of a run that is whole.

    Args:
        asked: what to measure on, and the effort.

    Raises:
        UserError: there are not two.
    """
    from dataclasses import replace

    from est_ds.analysis.hessian import measure_hessian
    from est_ds.analysis.output import of_run
    from est_ds.analysis.results import Along, along_result, hessian_result
    from est_ds.analysis.subject import DamagedCheckpoint
    from est_ds.errors import UserError

    (wanted, effort), each, damaged = asked, [], []
    folder = of_run(Path(design.config.run_dir))
    for step in steps if len(steps) > 1 else ():
        try:
            numbers = measure_hessian(replace(wanted, checkpoint=str(step)), effort)
        except DamagedCheckpoint:
            damaged.append(step)
            continue
        result = hessian_result(numbers)
        result.write(folder)
        each.append(numbers)
        if not parsed.json:
            print(result.said[0], flush=True)
    if len(each) < 2:
        of = f"{', '.join(map(str, damaged))} damaged" if damaged else "none damaged"
        raise UserError(
            f"--along needs two checkpoints of the full model; {design.config.run_dir!r} has "
            f"{len(steps)} ({of}). checkpoint.keep_last=0 keeps all that a run writes; --step S "
            f"measures one."
        )
    along = Along(tuple(each), tuple(damaged), design.method.phases, design.config.steps)
    give(along_result(along), folder, parsed)


def _stability(parsed: argparse.Namespace, arguments: list[str]) -> None:
    from est_ds.analysis.output import check_folder, of_run
    from est_ds.analysis.results import stability_result
    from est_ds.analysis.stability import measure_stability
    from est_ds.analysis.subject import checkpoints_of

    wanted = _wanted(parsed)
    design, _ = checkpoints_of(wanted)
    folder = of_run(Path(design.config.run_dir))
    check_folder(folder)
    give(stability_result(measure_stability(wanted)), folder, parsed)


def _wanted(parsed: argparse.Namespace):
    from transformers.utils import logging

    from est_ds.analysis.subject import Wanted

    logging.set_verbosity_error()
    return Wanted(parsed.run, tuple(parsed.overrides), parsed.step, parsed.windows)


def _linear(parsed: argparse.Namespace, arguments: list[str]) -> None:
    from est_ds.analysis.linear import Settings, measure_linear
    from est_ds.analysis.output import check_folder
    from est_ds.analysis.toy_results import linear_result

    given = {"depths": parsed.depths, "taus": parsed.taus, "seed": parsed.seed}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    settings.check()
    check_folder(parsed.out)
    give(linear_result(measure_linear(settings)), parsed.out, parsed)


def _toy(parsed: argparse.Namespace, arguments: list[str]) -> None:
    from est_ds.analysis.output import check_folder
    from est_ds.analysis.toy_results import measure_toy, toy_result

    check_folder(parsed.out)
    seeds = range(parsed.seed, parsed.seed + parsed.seeds)
    give(toy_result(measure_toy(seeds)), parsed.out, parsed)


def _polynomial(parsed: argparse.Namespace, arguments: list[str]) -> None:
    from est_ds.analysis.output import check_folder
    from est_ds.analysis.polynomial import Settings, measure_polynomial
    from est_ds.analysis.toy_results import polynomial_result

    given = {"steps": parsed.steps, "width": parsed.width}
    sizes = {name: value for name, value in given.items() if value is not None}
    seeds = tuple(range(parsed.seed, parsed.seed + (parsed.seeds or 1)))
    settings = Settings(**sizes, seeds=seeds)
    settings.check()
    check_folder(parsed.out)
    give(polynomial_result(measure_polynomial(settings)), parsed.out, parsed)


def give(result, folder: Path, parsed: argparse.Namespace) -> None:
    """Writes a result and prints it."""
    files = result.write(folder)
    if parsed.json:
        print(result.json)
        return
    for sentence in result.said:
        print(sentence)
    print(f"figure and numbers are {files[0]} and {files[1]}")
