"""FLOPs, weights and bytes of a plan in closed form. No torch.

Two figures, always named. `blocks`: matrix products of attention projections and MLP in the
layers, the papers' accounting. `model`: all matrix products of the step, attention scores and
output head included. A product of [m, k] and [k, n] is 2 m k n; forward plus backward is three
products for one, since the gradient of each operand is a product of the same size.

An encoder-decoder reads two streams: its first layers the source, the rest and the head the
target; the keys and values of a cross attention are of the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from est_ds.plans.methods.base import Load, Method, full_loads
from est_ds.plans.shape import Attention, ModelShape, Part

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a training step."""

    blocks: float
    model: float


@dataclass(frozen=True)
class Weights:
    """Weights of matrices that take part in products. Norms, biases and look-ups are not in it."""

    blocks: float
    model: float


@dataclass(frozen=True)
class Bytes:
    """Bytes of the layers, and of the whole model with its head."""

    blocks: float
    model: float


@dataclass(frozen=True, kw_only=True)
class Size:
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


def flops_by_layer(
    shape: ModelShape, loads: Sequence[Load], size: Size
) -> tuple[list[Flops], float]:
    """Returns the FLOPs of forward and backward of every layer, and of the output head."""
    source = target = (size.tokens, size.sequence)
    if shape.encoder_layers:
        target = (
            size.tokens if size.target_tokens is None else size.target_tokens,
            size.sequence if size.target_sequence is None else size.target_sequence,
        )
    projections, scores = [0.0] * shape.num_layers, [0.0] * shape.num_layers
    for i, part, chance, units, groups in _parts(shape, loads):
        stream = source if i < shape.encoder_layers else target
        per_unit = 2.0 * chance * part.hidden
        if not isinstance(part, Attention):
            projections[i] += stream[0] * per_unit * part.matrices * units
            continue
        keys = source if part.cross else stream
        projections[i] += per_unit * part.head_dim * 2 * (stream[0] * units + keys[0] * groups)
        # Queries against keys, and weights against values, over the whole sequence.
        scores[i] += stream[0] * chance * 4.0 * keys[1] * units * part.head_dim
    head = 2.0 * target[0] * (shape.hidden * shape.vocabulary + shape.head_inner)
    layers = [
        Flops(FORWARD_AND_BACKWARD * p, FORWARD_AND_BACKWARD * (p + s))
        for p, s in zip(projections, scores)
    ]
    return layers, FORWARD_AND_BACKWARD * head


def step_flops(shape: ModelShape, loads: Sequence[Load], **size: float | None) -> Flops:
    """Returns the FLOPs of a step; `size` is that of `Size`."""
    layers, head = flops_by_layer(shape, loads, Size(**size))
    blocks = sum(layer.blocks for layer in layers)
    return Flops(blocks, sum(layer.model for layer in layers) + head)


def dense_flops(shape: ModelShape, **size: float | None) -> Flops:
    """Returns the FLOPs of a step of the full model; `size` is that of `Size`."""
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


def saved(method: Method, *, sequence: int, target_sequence: int | None = None) -> Flops:
    """Fractions of the run's FLOPs that the method saves against dense training."""
    blocks = model = 0.0
    for i, phase in enumerate(method.phases):
        ratios = phase_ratios(method, i, sequence=sequence, target_sequence=target_sequence)
        length = phase.until_step - phase.from_step
        blocks += length * (1 - ratios.blocks)
        model += length * (1 - ratios.model)
    return Flops(blocks / method.steps, model / method.steps)


def active_weights(shape: ModelShape, loads: Sequence[Load]) -> Weights:
    """Weights that a step multiplies by.

    Attention: hidden x head_dim x (2 heads + 2 groups). MLP: hidden x columns x matrices. Head:
    hidden x vocabulary and what is before it. Of a decoder, `blocks` FLOPs are 6 x tokens x these.
    """
    blocks = 0.0
    for _, part, chance, units, groups in _parts(shape, loads):
        blocks += chance * sum(kept for kept, _ in _matrices(part, units, groups))
    return Weights(blocks, blocks + shape.hidden * shape.vocabulary + shape.head_inner)


def activation_bytes(
    shape: ModelShape,
    loads: Sequence[Load],
    *,
    tokens: float,
    value_bytes: int,
    checkpointing: bool = False,
) -> Bytes:
    """Bytes that the forward of a micro-batch of `tokens` tokens keeps for the backward.

    A token keeps, in values of `value_bytes`: of an attention 2 hidden (into the norm and out of
    it), q, k, v and the result, head_dim x (2 heads + 2 groups), and 4 bytes a head for the fused
    kernel's sums; of an MLP 2 hidden and, of every kept column, before and after the activation,
    and if gated the other factor and the product (2 or 4). The head keeps 2 hidden, and for the
    loss vocabulary x 4 bytes. A part that drops units also keeps a copy of its kept weights. With
    checkpointing a layer keeps its input, and the largest one is in whole.

    It is a lower bound: dropout, unfused kernels (an RMSNorm written out keeps one hidden more) and
    the allocator's slack come on top. Of the toy Llama torch keeps 1.10 to 1.13 times as much.
    """
    per_layer = [0.0] * shape.num_layers
    in_whole = [0.0] * shape.num_layers  # of a layer that is kept, for the one recomputed
    for i, part, chance, units, groups in _parts(shape, loads):
        if not units:
            continue
        values, sums = 2 * part.hidden, 0.0
        if isinstance(part, Attention):
            values += part.head_dim * (2 * units + 2 * groups)
            sums = 4 * units
        else:
            values += units * (4 if part.matrices == 3 else 2)
        copies = sum(kept for kept, whole in _matrices(part, units, groups) if kept < whole)
        of_part = tokens * (values * value_bytes + sums) + copies * value_bytes
        per_layer[i] += chance * of_part
        in_whole[i] += of_part if chance else 0.0
    blocks = sum(per_layer)
    if checkpointing:
        kept_layers = sum(load.probability for load in loads)
        blocks = kept_layers * tokens * shape.hidden * value_bytes + max(in_whole)
    head = tokens * (2 * shape.hidden * value_bytes + 4 * shape.vocabulary)
    return Bytes(blocks, blocks + head)


def weight_traffic_bytes(shape: ModelShape, loads: Sequence[Load], *, value_bytes: int) -> Bytes:
    """Bytes of weights and their gradients that a micro-batch moves through a device's memory.

    A matrix in whole is read in the forward and in the backward, and its gradient is written: 3
    times its weights. Of one that keeps a part, the part is gathered (read, written), used (read
    twice, gradient written) and its gradient added (twice read, written) into a zero gradient of
    the whole matrix: 8 times the part and once the whole. Slicing therefore saves products, not
    traffic; skipping layers saves both.
    """
    blocks = 0.0
    for _, part, chance, units, groups in _parts(shape, loads):
        for kept, whole in _matrices(part, units, groups):
            moved = 8 * kept + whole if 0 < kept < whole else 3 * kept
            blocks += chance * moved * value_bytes
    head = 3 * (shape.hidden * shape.vocabulary + shape.head_inner) * value_bytes
    return Bytes(blocks, blocks + head)


def gradient_share(method: Method, phase: int, micro_batches: int) -> float:
    """Expected share of the layers' weights whose gradients a step of a phase reduces.

    The micro-batches' plans are drawn apart, so that n of them leave a layer out with the n-th
    power of one's chance, and together they reduce a layer whole of which one keeps a part. Chances
    that change from step to step are those of at most 64 steps.

    Args:
        micro_batches: that have plans of their own; 1 where they share one.
    """
    within, sent, total = method.phases[phase], 0.0, 0.0
    parts_apart = micro_batches > 1 and getattr(method.settings, "skip", "layer") == "sublayer"
    every = -(-(within.until_step - within.from_step) // 64)
    for step in range(within.from_step, within.until_step, every):
        loads = method.computed(method.loads(step))
        for i, part, chance, units, groups in _parts(method.shape, loads):
            draws = micro_batches * (len(method.shape.layers[i]) if parts_apart else 1)
            whole = sum(weights for _, weights in _matrices(part, units, groups))
            sent += whole * (1.0 - (1.0 - chance) ** draws)
            total += whole
    return sent / total


def gathered_bytes(shape: ModelShape, loads: Sequence[Load], *, value_bytes: int) -> Bytes:
    """Bytes of weights that ZeRO-3 gathers on every device for a micro-batch.

    It gathers a matrix in whole, in the forward and again in the backward, if its part is kept.
    """
    blocks = 0.0
    for _, part, chance, units, groups in _parts(shape, loads):
        if units:
            blocks += 2 * chance * sum(w for _, w in _matrices(part, units, groups)) * value_bytes
    head = 2 * (shape.hidden * shape.vocabulary + shape.head_inner) * value_bytes
    return Bytes(blocks, blocks + head)


def _parts(
    shape: ModelShape, loads: Sequence[Load]
) -> Iterator[tuple[int, Part, float, float, float]]:
    """Every part with its layer, chance, and kept units and key/value heads."""
    for i, (layer, load) in enumerate(zip(shape.layers, loads, strict=True)):
        for part, units, groups in zip(layer, load.units, load.groups, strict=True):
            yield i, part, load.probability, units, groups


def _matrices(part: Part, units: float, groups: float) -> list[tuple[float, int]]:
    """Kept and all weights of the matrices over heads or columns, and over key/value heads."""
    if not isinstance(part, Attention):
        per_unit = part.hidden * part.matrices
        return [(per_unit * units, per_unit * part.columns)]
    per_head = 2 * part.hidden * part.head_dim
    return [(per_head * units, per_head * part.heads), (per_head * groups, per_head * part.groups)]
