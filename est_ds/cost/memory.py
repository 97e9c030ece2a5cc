"""What a process holds: weights, gradients, optimizer state."""

from __future__ import annotations

from dataclasses import dataclass

from est_ds.config.sections import RunConfig


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
