"""The first difference between two runs of the same steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, prod, sqrt
from pathlib import Path
from typing import Any

import torch

from est_ds.checkpoints.reader import WEIGHT, Checkpoint
from est_ds.checkpoints.store import Store
from est_ds.run.metrics import read_metrics

EXACT = ("phase", "lr", "tokens", "kept_layers", "plan_digest", "data_digest")


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences; 0 demands the same bits.

    Of weights and of moments it is the norm of the difference over the norm, of the whole model:
    AdamW steps a weight whose gradient is nothing but rounding as far as any other, so that such
    a tensor taken alone says little.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    weight: float = 0.0
    moment: float = 0.0


@dataclass(frozen=True)
class Difference:
    """Two values that should be the same.

    Attributes:
        step: the step whose training, or after which, they differ.
        relative: the difference over the expected value; None where only equality counts.
    """

    step: int
    quantity: str
    expected: Any
    found: Any
    relative: float | None = None
    bound: float = 0.0

    def __str__(self) -> str:
        text = (
            f"step {self.step}: {self.quantity} is {self.expected!r} in the uninterrupted run and "
            f"{self.found!r} in the resumed one"
        )
        if self.relative is None:
            return text
        return f"{text} (relative difference {self.relative:.3g}, allowed {self.bound:g})"


@dataclass
class Comparison:
    """What a comparison found.

    Attributes:
        first: the first difference beyond the bounds; None if there is none.
        largest: largest relative difference of every quantity up to there.
        exact_until: the first step of the resumed half.
    """

    exact_until: int
    first: Difference | None = None
    largest: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.first is not None:
            is_early = self.first.step < self.exact_until
            early = "; that is before the kill: the run does not repeat itself here" * is_early
            return f"DIFFERENT from {self.first}{early}"
        if not self.largest:
            return "PASS: every step, weight and moment is identical"
        shown = ", ".join(f"{name} {value:.2g}" for name, value in self.largest.items())
        return f"PASS: within the bounds; largest relative differences: {shown}"


def compare_runs(expected: Path, found: Path, bounds: Bounds, exact_until: int = 0) -> Comparison:
    """Compares the metrics of all steps, and the checkpoints that both runs hold.

    Args:
        expected: a run directory.
        found: another one.
        exact_until: steps before it must be the same bit for bit.
    """
    comparison = Comparison(exact_until)
    for difference in _differences(expected, found, bounds, exact_until):
        if difference.relative is not None:
            kind = difference.quantity.split(" of ")[0]
            largest = comparison.largest.get(kind, 0.0)
            comparison.largest[kind] = max(largest, difference.relative)
            if difference.relative <= difference.bound:
                continue
        comparison.first = difference
        break
    return comparison


def _differences(
    expected: Path, found: Path, bounds: Bounds, exact_until: int
) -> Iterator[Difference]:
    """What differs at all, in the order in which training made it."""
    runs = []
    for run in (expected, found):
        steps, evaluations = read_metrics(run)
        runs.append(({e["step"]: e for e in steps}, {e["step"]: e for e in evaluations}))
    (steps, evaluations), (other_steps, other_evaluations) = runs
    stores = [Store.of(run) for run in (expected, found)]
    saved = set(stores[0].steps()) & set(stores[1].steps())
    for step in range(max([*steps, *other_steps, *(s - 1 for s in saved)], default=-1) + 1):
        allowed = Bounds() if step < exact_until else bounds
        pair = steps.get(step), other_steps.get(step)
        yield from _line_differences(step, *pair, allowed)
        pair = evaluations.get(step), other_evaluations.get(step)
        if pair != (None, None):
            yield from _numbers(step, "eval_loss", *pair, allowed.loss)
        if step + 1 in saved:
            folders = [store.path(step + 1) for store in stores]
            yield from _checkpoint_differences(step, *folders, allowed)


def _line_differences(step: int, one: dict | None, other: dict | None, allowed: Bounds):
    if one is None or other is None:
        there = ["logged" if line else "not logged" for line in (one, other)]
        if one is not other:
            yield Difference(step, "the step", *there)
        return
    for name in EXACT:
        if one[name] != other[name]:
            yield Difference(step, name, one[name], other[name])
    for name, bound in (("loss", allowed.loss), ("grad_norm", allowed.grad_norm)):
        yield from _numbers(step, name, one, other, bound)


def _numbers(step: int, name: str, one: dict | None, other: dict | None, bound: float):
    a, b = (None if line is None else line[name] for line in (one, other))
    if a == b:
        return
    if a is None or b is None:
        yield Difference(step, name, a, b)
        return
    yield Difference(step, name, a, b, abs(a - b) / abs(a) if a else inf, bound)


def _checkpoint_differences(step: int, one: Path, other: Path, allowed: Bounds):
    with Checkpoint(one) as expected, Checkpoint(other) as found:
        states = [c.index.state for c in (expected, found)]
        counts = [s.optimizer_steps for s in states]
        if counts[0] != counts[1]:
            yield Difference(step, "AdamW's count of steps", *counts)
        births = [s.births for s in states]
        if births[0] != births[1]:
            yield Difference(step, "the counts of steps at which layers began", *births)
        shapes = expected.index.parameters
        if shapes != found.index.parameters:
            yield Difference(step, "parameters", shapes, found.index.parameters)
            return
        yield from _state_differences(step, WEIGHT, expected, found, allowed.weight)
        for state in sorted(expected.keys & found.keys - {WEIGHT}):
            yield from _state_differences(step, state, expected, found, allowed.moment)


def _state_differences(
    step: int, state: str, expected: Checkpoint, found: Checkpoint, bound: float
) -> Iterator[Difference]:
    """One for the whole model, with the values of the element that is furthest off."""
    furthest, values = 0.0, None
    squares = {"off": 0.0, "all": 0.0}
    for name, shape in expected.index.parameters.items():
        a, b = (c.read(name, state, 0, prod(shape)).double() for c in (expected, found))
        squares["all"] += a.square().sum().item()
        if torch.equal(a, b):
            continue
        off = (a - b).abs().nan_to_num(torch.inf)
        squares["off"] += off.square().sum().item()
        i = int(off.argmax())
        if off[i] > furthest:
            furthest, values = off[i].item(), (f"{name}[{i}]", a[i].item(), b[i].item())
    if values:
        place, one, other = values
        relative = sqrt(squares["off"] / squares["all"]) if squares["all"] else inf
        yield Difference(step, f"{state} of {place}", one, other, relative, bound)
