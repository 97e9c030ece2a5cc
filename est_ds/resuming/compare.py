"""The first difference between two runs of the same steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from est_ds.checkpoints.reader import WEIGHT, Checkpoint
from est_ds.checkpoints.store import Store
from est_ds.metrics import read_metrics

EXACT = ("phase", "lr", "tokens", "kept_layers", "plan_digest", "data_digest")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences; 0 demands the same bits.

    Of a weight or moment it is the norm of the difference over the norm of the tensor: of single
    elements it says little, since AdamW steps a weight whose gradient is all rounding as far as
    any other.
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
    """

    first: Difference | None = None
    largest: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.first is not None:
            return f"DIFFERENT from {self.first}"
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
    comparison = Comparison()
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
    stores = [Store(run / "checkpoints") for run in (expected, found)]
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
    yield Difference(step, name, a, b, abs(a - b) / abs(a) if a else float("inf"), bound)


def _checkpoint_differences(step: int, one: Path, other: Path, allowed: Bounds):
    with Checkpoint(one) as expected, Checkpoint(other) as found:
        counts = [c.index.state["optimizer_steps"] for c in (expected, found)]
        if counts[0] != counts[1]:
            yield Difference(step, "AdamW's count of steps", *counts)
        shapes = expected.index.parameters
        if shapes != found.index.parameters:
            yield Difference(step, "parameters", shapes, found.index.parameters)
            return
        for name, shape in shapes.items():
            for state in (WEIGHT, *MOMENTS):
                tensors = [c.read(name, state, 0, prod(shape)) for c in (expected, found)]
                bound = allowed.weight if state == WEIGHT else allowed.moment
                yield from _tensor_differences(step, f"{state} of {name}", *tensors, bound)


def _tensor_differences(step: int, quantity: str, a: Tensor, b: Tensor, bound: float):
    if torch.equal(a, b):
        return
    off = (a - b).double()
    norm = a.double().norm().item()
    relative = off.norm().item() / norm if norm else float("inf")
    i = int(torch.where(a == b, -1.0, off.abs().nan_to_num(torch.inf)).argmax())
    yield Difference(step, f"{quantity}[{i}]", a[i].item(), b[i].item(), relative, bound)
