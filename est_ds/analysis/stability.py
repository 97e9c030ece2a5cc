"""`analyse stability`: what a full model loses when one layer is skipped (arXiv 2402.05913).

RaPTr's paper (section 5) asks why the loss does not jump where a phase with more layers begins.
With F(x) the residual state behind the last layer and F_-l(x) the same without layer l,

    Psi_l = mean over windows and positions of |F(x) - F_-l(x)|,

and for a loss that does not see the scale of F, as behind a norm, the gap between the loss of the
full model and the mean of those without one layer is at most of the order of the mean of
Psi_l / |F|. The definitions are ours as far as the abstract leaves them open.

Shapes: B windows, T positions, H hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from est_ds.analysis.subject import Batch, Subject, Wanted, open_subject
from est_ds.engine.loss import RowLoss
from est_ds.plans.plan import Plan, full_plan
from est_ds.plans.shape import ModelShape
from est_ds.run.metrics import read_boundaries
from est_ds.slicing.subnetwork import Subnetwork


@dataclass
class Measured:
    """Of every window, in the order of the batches.

    Attributes:
        weights: share of a window in the mean loss.
        losses: of the full model.
        norms: by the place of the state, 0 before the first layer of a stack.
        psi, relative: |F - F_-l| and its ratio to |F|, means over positions, by layer.
        without: losses of the model without a layer, by layer.
    """

    weights: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    psi: dict[int, list[float]] = field(default_factory=dict)
    relative: dict[int, list[float]] = field(default_factory=dict)
    without: dict[int, list[float]] = field(default_factory=dict)


def measure_stability(wanted: Wanted) -> dict[str, Any]:
    """Returns norms, Psi and losses, as they stand in the file of numbers.

    Raises:
        UserError: see `open_subject`.
    """
    began = time.monotonic()
    subject = open_subject(wanted)
    measured = measure(subject)
    lines = read_boundaries(subject.directory)
    return {
        "step": subject.step,
        "windows": wanted.windows,
        **numbers_of(measured, stacks_of(subject.design.method.shape)),
        "boundaries": lines,
        "seconds": time.monotonic() - began,
    }


def stacks_of(shape: ModelShape) -> dict[str, range]:
    """Returns the layers along each residual stream: a model has one, an encoder-decoder two."""
    of_encoder, every = shape.encoder_layers, shape.num_layers
    if not of_encoder:
        return {"model": range(every)}
    return {"encoder": range(of_encoder), "decoder": range(of_encoder, every)}


@torch.no_grad()
def measure(subject: Subject) -> Measured:
    """Runs the full model and the model without each layer on every batch."""
    design, model = subject.design, subject.model
    layers, shape = design.family.layers(model), design.method.shape
    subnetwork = Subnetwork(design.family, shape, dict(enumerate(layers)))
    stacks, found = list(stacks_of(shape).values()), Measured()
    try:
        for batch in subject.batches:
            with states_behind(layers, [s[0] for s in stacks]) as states:
                losses, weights = _row_losses(subject, batch)
            found.losses += losses
            found.weights += weights
            for number, stack in enumerate(stacks):
                for place, state in enumerate([states[~stack[0]], *(states[i] for i in stack)]):
                    rows = found.norms.setdefault((number, place), [])
                    rows += _by_window(state.norm(dim=-1))
                whole_BTH = states[stack[-1]]
                for skipped in stack:
                    with (
                        subnetwork.active(plan_without(skipped, shape)),
                        states_behind(layers[stack[-1] : stack[-1] + 1]) as last,
                    ):
                        losses, _ = _row_losses(subject, batch)
                    psi_BT = (last[0] - whole_BTH).norm(dim=-1)
                    of_F_BT = psi_BT / whole_BTH.norm(dim=-1)
                    found.psi.setdefault(skipped, []).extend(_by_window(psi_BT))
                    found.relative.setdefault(skipped, []).extend(_by_window(of_F_BT))
                    found.without.setdefault(skipped, []).extend(losses)
    finally:
        subnetwork.uninstall()
    return found


def plan_without(skipped: int, shape: ModelShape) -> Plan:
    """Returns the plan that keeps everything but one layer."""
    plan = full_plan(0, 0, [tuple(part.units for part in parts) for parts in shape.layers])
    layers = (None if i == skipped else layer for i, layer in enumerate(plan.layers))
    return replace(plan, layers=tuple(layers))


@contextmanager
def states_behind(
    layers: list[nn.Module], before: Sequence[int] = ()
) -> Iterator[dict[int, Tensor]]:
    """Collects what layers return in a forward: their residual states [B, T, H], by place.

    Args:
        before: places of layers whose input is collected too, under `~place`.
    """
    states: dict[int, Tensor] = {}

    def note(place: int, value: Any) -> None:
        states[place] = (value[0] if isinstance(value, tuple) else value).float()

    with ExitStack() as hooks:
        for place, layer in enumerate(layers):
            hook = layer.register_forward_hook(
                lambda _module, _inputs, output, place=place: note(place, output)
            )
            hooks.callback(hook.remove)
        for place in before:
            hook = layers[place].register_forward_pre_hook(
                lambda _module, args, kwargs, place=place: note(
                    ~place, args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        yield states


def _row_losses(subject: Subject, batch: Batch) -> tuple[list[float], list[float]]:
    """Loss of every window of a batch, and its share in the mean over all batches."""
    loss = RowLoss(subject.design.objective.loss)
    with loss.noted() as rows:
        mean = loss(subject.logits(batch), batch.labels).item()
    total = sum(x * n for x, n in zip(rows.losses, rows.targets))
    # The mean has its own divisor: windows may differ in their number of targets.
    per_target = batch.weight * (mean / total if total else 0.0)
    return rows.losses, [per_target * n for n in rows.targets]


def _by_window(values_BT: Tensor) -> list[float]:
    return values_BT.mean(1).tolist()


def numbers_of(measured: Measured, stacks: dict[str, range]) -> dict[str, Any]:
    """Returns means over the windows, with standard errors."""
    shares = np.array(measured.weights)
    full = np.array(measured.losses)
    gaps = {i: full - np.array(losses) for i, losses in measured.without.items()}
    mean_gap = np.mean(list(gaps.values()), axis=0)
    found: dict[str, Any] = {
        "loss": _mean(full, shares)[0],
        "gap": dict(zip(("mean", "standard_error"), _mean(mean_gap, shares))),
        "stacks": {},
    }
    for number, (name, stack) in enumerate(stacks.items()):
        norms = [_mean(measured.norms[number, i])[0] for i in range(len(stack) + 1)]
        first = _mean(measured.psi[stack[0]])[0]
        layers = []
        for i in stack:
            psi, error = _mean(measured.psi[i])
            layers.append(
                {
                    "layer": i,
                    "psi": psi,
                    "psi_error": error,
                    "psi_over_first": psi / first if first else None,
                    "psi_over_norm": _mean(measured.relative[i])[0],
                    "loss_without": _mean(measured.without[i], shares)[0],
                    "gap": _mean(gaps[i], shares)[0],
                    "gap_error": _mean(gaps[i], shares)[1],
                }
            )
        mean_psi = sum(layer["psi_over_norm"] for layer in layers) / len(layers)
        found["stacks"][name] = {"norms": norms, "layers": layers, "mean_psi_over_norm": mean_psi}
    return found


def _mean(values: Any, shares: np.ndarray | None = None) -> tuple[float, float | None]:
    """Mean over the windows and its standard error, None of a single window.

    Args:
        shares: of every window in the mean; equal ones if None.
    """
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    shares = np.full(count, 1 / count) if shares is None else shares / shares.sum()
    mean = float((shares * values).sum())
    if count < 2:
        return mean, None
    square = (shares**2 * (values - mean) ** 2).sum() * count / (count - 1)
    return mean, math.sqrt(square)
