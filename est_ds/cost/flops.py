"""FLOPs of a plan in closed form. No torch.

Two figures, always named. `blocks`: matrix products of attention projections and MLP in the
layers, the papers' accounting. `model`: all matrix products of the step, attention scores and
output head included; of state-space layers those of `est_ds/cost/state_space.py`. A product of
[m, k] and [k, n] is 2 m k n; forward plus backward is three products for one, since the gradient of
each operand is a product of the same size.

An encoder-decoder reads two streams: its first layers the source, the rest and the head the
target; the keys and values of a cross attention are of the source. Where a share f of the positions
passes through a layer, its projections cost f of the whole, and its scores f squared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from est_ds.cost.state_space import projected, scanned, weights
from est_ds.plans.methods.base import Load, Method, full_loads
from est_ds.plans.shape import Attention, ModelShape, Part, StateSpace

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a training step."""

    blocks: float
    model: float


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """How much a step reads.

    Attributes:
        tokens: of all sequences.
        sequence: tokens of a sequence.
        target_tokens: tokens of an encoder-decoder's target stream (default: as many).
        target_sequence: their sequence length (default: the same).
    """

    tokens: float
    sequence: int
    target_tokens: float | None = None
    target_sequence: int | None = None

    @property
    def source(self) -> tuple[float, int]:
        """Tokens, and those of a sequence, of the only stream, or of an encoder's."""
        return self.tokens, self.sequence

    @property
    def target(self) -> tuple[float, int]:
        """The same of a decoder's stream."""
        return (
            self.tokens if self.target_tokens is None else self.target_tokens,
            self.sequence if self.target_sequence is None else self.target_sequence,
        )


def flops_by_layer(
    shape: ModelShape, loads: Sequence[Load], size: StepSize
) -> tuple[list[Flops], float]:
    """Returns the FLOPs of forward and backward of every layer, and of the output head."""
    source, target = size.source, size.target if shape.encoder_layers else size.source
    projections, scores = [0.0] * shape.num_layers, [0.0] * shape.num_layers
    for i, part, chance, units, groups in _parts(shape, loads):
        stream = source if i < shape.encoder_layers else target
        if isinstance(part, StateSpace):
            projections[i] += stream[0] * chance * projected(part, units)
            scores[i] += stream[0] * chance * scanned(part, units, stream[1])
            continue
        per_unit = 2.0 * chance * part.hidden * loads[i].positions
        if not isinstance(part, Attention):
            projections[i] += stream[0] * per_unit * part.matrices * units
            continue
        keys = source if part.cross else stream
        projections[i] += per_unit * part.head_dim * 2 * (stream[0] * units + keys[0] * groups)
        # Queries against keys, and weights against values, over the whole sequence.
        dense = stream[0] * chance * 4.0 * keys[1] * units * part.head_dim
        scores[i] += dense * loads[i].squared
    head = 2.0 * target[0] * (shape.hidden * shape.vocabulary + shape.head_inner)
    layers = [
        Flops(FORWARD_AND_BACKWARD * p, FORWARD_AND_BACKWARD * (p + s))
        for p, s in zip(projections, scores)
    ]
    return layers, FORWARD_AND_BACKWARD * head


def step_flops(shape: ModelShape, loads: Sequence[Load], **size: Any) -> Flops:
    """Returns the FLOPs of a step; `size` is that of `StepSize`."""
    layers, head = flops_by_layer(shape, loads, StepSize(**size))
    blocks = sum(layer.blocks for layer in layers)
    return Flops(blocks, sum(layer.model for layer in layers) + head)


def dense_flops(shape: ModelShape, **size: Any) -> Flops:
    """Returns the FLOPs of a step of the full model; `size` is that of `StepSize`."""
    return step_flops(shape, full_loads(shape), **size)


def phase_ratios(
    method: Method, phase: int, *, sequence: int, target_sequence: int | None = None
) -> Flops:
    """Mean FLOPs of a phase's steps as ratios of the dense step."""
    size = {"tokens": sequence, "sequence": sequence, "target_sequence": target_sequence}
    size["target_tokens"] = target_sequence
    dense = dense_flops(method.shape, **size)
    active = step_flops(method.shape, method.computed(method.mean_loads(phase)), **size)
    return Flops(active.blocks / dense.blocks, active.model / dense.model)


def computes_everything(method: Method, phase: int, sequence: int) -> bool:
    """Whether every step of a phase computes the full model."""
    ratios = phase_ratios(method, phase, sequence=sequence)
    return math.isclose(ratios.blocks, 1.0, rel_tol=1e-12)


def saved(method: Method, *, sequence: int, target_sequence: int | None = None) -> Flops:
    """Fractions of the run's FLOPs that the method saves against dense training."""
    blocks = model = 0.0
    for i, phase in enumerate(method.phases):
        ratios = phase_ratios(method, i, sequence=sequence, target_sequence=target_sequence)
        length = phase.until_step - phase.from_step
        blocks += length * (1 - ratios.blocks)
        model += length * (1 - ratios.model)
    return Flops(blocks / method.steps, model / method.steps)


def gradient_share(method: Method, phase: int, micro_batches: int, by_unit: bool = False) -> float:
    """Expected share of the layers' weights whose gradients a step of a phase reduces.

    The micro-batches' plans are drawn apart, so that n of them leave a layer out with the n-th
    power of one's chance, and together they reduce a layer whole of which one keeps a part. Chances
    that change from step to step are those of at most 64 steps.

    Args:
        micro_batches: that have plans of their own; 1 where they share one.
        by_unit: where they share one, a part's kept heads or columns alone are reduced.
    """
    within, sent, total = method.phases[phase], 0.0, 0.0
    parts_apart = micro_batches > 1 and getattr(method.settings, "skip", "layer") == "sublayer"
    every = -(-(within.until_step - within.from_step) // 64)
    for step in range(within.from_step, within.until_step, every):
        loads = method.computed(method.loads(step))
        for i, part, chance, units, groups in _parts(method.shape, loads):
            draws = micro_batches * (len(method.shape.layers[i]) if parts_apart else 1)
            whole = part_weights(part)
            reduced = kept_weights(part, units, groups) if by_unit and draws == 1 else whole
            sent += reduced * (1.0 - (1.0 - chance) ** draws)
            total += whole
    return sent / total


def _parts(
    shape: ModelShape, loads: Sequence[Load]
) -> Iterator[tuple[int, Part, float, float, float]]:
    """Every part with its layer, chance, and kept units and key/value heads."""
    for i, (layer, load) in enumerate(zip(shape.layers, loads, strict=True)):
        for part, units, groups in zip(layer, load.units, load.key_value_groups, strict=True):
            yield i, part, load.probability, units, groups


def part_weights(part: Part) -> int:
    """Weights of the matrices of a whole part."""
    if isinstance(part, Attention):
        return round(kept_weights(part, part.heads, part.key_value_groups))
    return round(kept_weights(part, part.columns, 0))


def kept_weights(part: Part, units: float, key_value_groups: float) -> float:
    """The same of kept heads or columns, and key/value heads."""
    if isinstance(part, StateSpace):
        return weights(part, units)
    if isinstance(part, Attention):
        return 2 * part.hidden * part.head_dim * (units + key_value_groups)
    return part.hidden * part.matrices * units
