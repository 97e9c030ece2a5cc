"""What the training loop sees of an engine.

Shapes: ids and labels [B, T] (micro-batch, sequence), int64; label -100 is ignored. A micro-batch
is inputs (ids; of an encoder-decoder also the decoder's) and labels (alone, or with a divisor).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from est_ds.config import Optimizer, RunConfig
from est_ds.data.loader import Inputs, Labels
from est_ds.plans.growth import Growth
from est_ds.slicing.families.base import Family
from est_ds.slicing.subnetwork import Subnetwork

if TYPE_CHECKING:  # it imports DeepSpeed, which must not happen before the processes start
    from est_ds.engine.growing import LayerStates

MicroBatch = tuple[Inputs, Labels]


def token_loss(logits_BTV: Tensor, labels: Labels) -> Tensor:
    """Cross-entropy summed over the tokens that count, over their number: nats per token.

    The number is B * T, or the divisor given with the labels. It does not depend on the labels
    themselves, so that micro-batches may be averaged in any grouping (a padded batch counts for
    what it holds).
    """
    labels_BT, divisor = labels if isinstance(labels, tuple) else (labels, labels.numel())
    losses = cross_entropy(
        logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=-100, reduction="sum"
    )
    return losses / divisor


def adamw(parameters: Iterable[nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with two groups: matrices decay, norms and biases do not.

    Every pipe stage has both groups, even if one held nothing: DeepSpeed reduces norms group by
    group, and hangs where stages differ in their number.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
    )


class Engine(ABC):
    """A DeepSpeed engine, its slicing and its coordinates.

    Attributes:
        subnetwork: slicing on the layers that live in this process.
        layers: these layers, by their index in the plan.
        layer_states: weights and moments of these layers.
        replica: this process's data-parallel rank.
        num_replicas: data-parallel size.
    """

    subnetwork: Subnetwork
    layers: dict[int, nn.Module]
    layer_states: LayerStates
    hf_config: Any
    family: Family
    replica: int
    num_replicas: int
    config: RunConfig
    deepspeed: Any

    @abstractmethod
    def train_batch(self, batches: Iterator[MicroBatch]) -> float:
        """One optimizer step over this replica's micro-batches; the mean loss of all replicas."""

    @abstractmethod
    def mean_loss(self, batches: list[MicroBatch]) -> float:
        """The mean of `token_loss` over all replicas' micro-batches, without gradients."""

    @abstractmethod
    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights that live in this process, by their Hugging Face names."""

    @property
    def layout(self) -> dict[str, int]:
        return self.config.layout(self.num_replicas * self.config.parallel.pipe)

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradients before clipping; None if none was computed."""
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def clip_over(self, group: Any | None) -> None:
        """Replaces DeepSpeed's clipping without ZeRO, which clips every pipe stage by its own norm
        and does not say the norm.

        Args:
            group: the processes that hold the pipe stages of this replica; None: this one alone.
        """
        self.deepspeed.clip_fp32_gradients = partial(_clip, self.deepspeed, group)

    def grow(self, growth: Growth) -> None:
        """Copies layers and adds fresh ones, weights and moments. Every process calls it."""
        from est_ds.engine.growing import identity_layers

        mine = [i for i in growth.fresh if i in self.layers]
        self.layer_states.grow(
            growth, identity_layers(self.hf_config, self.family, self.config.seed, mine)
        )

    def set_learning_rate(self, rate: float) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Every rank writes its part of a checkpoint to folder/tag."""
        self.deepspeed.save_checkpoint(
            str(folder), tag=tag, client_state={"est_ds": state}, save_latest=False
        )

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Every rank reads its part; returns what `save` was given as state."""
        path, state = self.deepspeed.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint at {folder / tag}")
        return state["est_ds"]

    def write_events(self, events: dict[str, float], samples: int) -> None:
        """Sends figures to DeepSpeed's monitor (TensorBoard and whatever else is configured)."""
        if self.deepspeed.monitor.enabled:
            self.deepspeed.monitor.write_events([(k, v, samples) for k, v in events.items()])


def _clip(engine: Any, group: Any | None) -> None:
    gradients = [
        p.grad
        for p in engine.module.parameters()
        if p.grad is not None and not getattr(p, "ds_pipe_replicated", False)
    ]
    squares = torch.nn.utils.get_total_norm(gradients) ** 2
    if group is not None:
        dist.all_reduce(squares, group=group)
    norm = engine._global_grad_norm = squares.sqrt()
    torch.nn.utils.clip_grads_with_norm_(
        engine.module.parameters(), engine.gradient_clipping(), norm
    )


def keep_float32_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that must survive DeepSpeed's cast of the whole module (rotary frequencies)."""
    return {n: b.clone() for n, b in module.named_buffers() if b.dtype == torch.float32}


def restore_float32_buffers(module: nn.Module, kept: dict[str, Tensor]) -> None:
    """Puts back what `keep_float32_buffers` kept, on the device where the module now is."""
    for name, buffer in kept.items():
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        setattr(parent, leaf, buffer.to(getattr(parent, leaf).device))
