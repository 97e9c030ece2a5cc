"""FLOPs of a plan in closed form. No torch.

Two figures, always named. `blocks`: matrix products of attention projections and MLP in the
layers, the papers' accounting. `model`: all matrix products of the step, attention scores and
output head included. A product of [m, k] and [k, n] is 2 m k n; forward plus backward is three
products for one, since the gradient of each operand is a product of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from est_ds.plans.methods.base import Load, Method, full_loads
from est_ds.plans.shape import Attention, ModelShape, Part

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a training step."""

    blocks: float
    model: float


def step_flops(
    shape: ModelShape, loads: Sequence[Load], *, tokens: int, sequence: int
) -> Flops:
    """FLOPs of forward and backward over `tokens` tokens in sequences of `sequence`."""
    projections = scores = 0.0
    for layer, load in zip(shape.layers, loads):
        for part, units, groups in zip(layer, load.units, load.groups):
            projections += load.probability * _projections_per_token(part, units, groups)
            if isinstance(part, Attention):
                # Queries against keys, and weights against values, over the whole sequence.
                scores += load.probability * 4.0 * sequence * units * part.head_dim
    head = 2.0 * shape.hidden * shape.vocabulary
    blocks = FORWARD_AND_BACKWARD * tokens * projections
    return Flops(blocks, blocks + FORWARD_AND_BACKWARD * tokens * (scores + head))


def _projections_per_token(part: Part, units: int, groups: int) -> float:
    if isinstance(part, Attention):
        return 2.0 * part.hidden * part.head_dim * (2 * units + 2 * groups)
    return 2.0 * part.hidden * part.matrices * units


def dense_flops(shape: ModelShape, *, tokens: int, sequence: int) -> Flops:
    """FLOPs of a step of the full model."""
    return step_flops(shape, full_loads(shape), tokens=tokens, sequence=sequence)


def phase_ratios(method: Method, phase: int, *, sequence: int) -> Flops:
    """Mean FLOPs of a phase's steps as ratios of the dense step."""
    dense = dense_flops(method.shape, tokens=1, sequence=sequence)
    loads = method.mean_loads(phase)
    active = step_flops(method.shape, loads, tokens=1, sequence=sequence)
    return Flops(active.blocks / dense.blocks, active.model / dense.model)


def saved(method: Method, *, sequence: int) -> Flops:
    """Fractions of the run's FLOPs that the method saves against dense training."""
    blocks = model = 0.0
    for i, phase in enumerate(method.phases):
        ratios = phase_ratios(method, i, sequence=sequence)
        length = phase.until_step - phase.from_step
        blocks += length * (1 - ratios.blocks)
        model += length * (1 - ratios.model)
    return Flops(blocks / method.steps, model / method.steps)
