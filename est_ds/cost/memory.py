"""What a process holds: weights, gradients, optimizer state, activations. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from est_ds.config.sections import RunConfig
from est_ds.cost.flops import StepSize
from est_ds.cost.state_space import kept_of_scan, kept_values
from est_ds.plans.shape import Attention, ModelShape, StateSpace


@dataclass(frozen=True)
class Memory:
    """Bytes that one process of the fullest pipe stage needs, activations and buffers aside; and
    on the host, with `parallel.offload`."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    host_bytes: float = 0.0

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


def memory_per_process(parameters: int, config: RunConfig, data_parallel: int) -> Memory:
    """Model states of a process that holds `parameters`, as DeepSpeed keeps them.

    With w = 2 bytes (bf16) or 4 (fp32) a parameter and d replicas: weights w; gradients, which are
    added up in float32, 4, or 4 / d from ZeRO 2; AdamW's two moments 8 and a float32 copy of the
    weights 4 (ZeRO 1 and 2 keep one for float32 weights too), and with `optimizer.inactive=freeze`
    a count of steps 4, divided by d from ZeRO 1. From ZeRO 3 the weights are divided by d as well
    (arXiv 1910.02054, figure 1). With the optimizer on the host its state and the float32 gradients
    are there.
    """
    zero, offload = config.parallel.zero, config.parallel.offload
    width = 2 if config.precision == "bf16" else 4
    has_copy = width == 2 or zero in (1, 2) or offload
    counts = config.optimizer.inactive == "freeze"

    def share(first_stage: int) -> float:
        return parameters / (data_parallel if zero >= first_stage else 1)

    optimizer_bytes = (8 + 4 * has_copy + 4 * counts) * share(1)
    gradients_bytes = 4 * share(2)
    return Memory(
        weights_bytes=width * share(3),
        gradients_bytes=gradients_bytes,
        optimizer_bytes=0 if offload else optimizer_bytes,
        host_bytes=optimizer_bytes + gradients_bytes if offload else 0,
    )


def activations_by_layer(
    shape: ModelShape, size: StepSize, *, value_bytes: int
) -> tuple[list[float], float]:
    """Returns the bytes that every layer, and the head, keep of a forward of the full model.

    For the backward a token keeps, in values of `value_bytes`: of an attention 2 hidden (into the
    norm and out of it), q, k, v and the result, head_dim x (2 heads + 2 key/value heads), and 4
    bytes a head for the fused kernel's sums; of an MLP 2 hidden and, of every column, before and
    after the activation, and if gated the other factor and the product (2 or 4); of a state-space
    mixer 2 hidden and what `est_ds/cost/state_space.py` says. The head keeps 2 hidden, and for the
    loss vocabulary x 4 bytes.

    It is a lower bound: unfused kernels (an RMSNorm written out keeps one hidden more, GPT-2's GELU
    three columns) and the allocator's slack come on top.
    """
    source, target = size.source[0], size.target[0] if shape.encoder_layers else size.source[0]
    layers = []
    for i, parts in enumerate(shape.layers):
        tokens = source if i < shape.encoder_layers else target
        kept = 0.0
        for part in parts:
            values: float = 2 * part.hidden
            if isinstance(part, Attention):
                keys = source if part.cross else tokens
                kept += keys * 2 * part.head_dim * part.key_value_groups * value_bytes
                kept += tokens * 4 * part.heads
                values += 2 * part.head_dim * part.heads
            elif isinstance(part, StateSpace):
                values += kept_values(part)
                kept += tokens * 4 * kept_of_scan(part, size.sequence)
            else:
                values += part.columns * (4 if part.matrices == 3 else 2)
            kept += tokens * values * value_bytes
        layers.append(kept)
    return layers, target * (2 * shape.hidden * value_bytes + 4 * shape.vocabulary)


def activations_of_stages(
    layers: list[float],
    head: float,
    *,
    cuts: list[int],
    accumulation: int,
    input_bytes: float | None = None,
) -> list[float]:
    """Returns the bytes of activations of every pipe stage.

    Stage s of S has up to S - s micro-batches between their forward and their backward (one
    forward, one backward: arXiv 2006.09503, figure 4), and no more than there are in a step.

    Args:
        layers: of every layer, for one micro-batch.
        head: of the last stage.
        cuts: ends of the layer ranges of the stages.
        accumulation: micro-batches of a step.
        input_bytes: with checkpointing a layer keeps its input alone, and one at a time is whole.
    """
    stages = []
    for s, (first, end) in enumerate(zip([0, *cuts], cuts)):
        whole = layers[first:end]
        kept = sum(whole) if input_bytes is None else input_bytes * len(whole)
        kept += head if end == cuts[-1] else 0.0
        again = 0.0 if input_bytes is None else max(whole, default=0.0)
        stages.append(min(len(cuts) - s, accumulation) * kept + again)
    return stages
