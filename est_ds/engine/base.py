"""What the training loop sees of an engine.

Shapes: ids and labels [B, T] (micro-batch, sequence), int64; label -100 is ignored. A micro-batch
is inputs (ids; of an encoder-decoder also the decoder's; where documents are kept apart also
positions) and labels (alone, or with a divisor).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from est_ds.config import Optimizer, RunConfig
from est_ds.data.loader import Inputs, Labels
from est_ds.engine.fragments import Fragments
from est_ds.engine.growing import grow
from est_ds.engine.inactive import FreezingAdamW
from est_ds.engine.setup import quiet
from est_ds.errors import naming
from est_ds.plans.growth import Growth
from est_ds.slicing.families.base import Family
from est_ds.slicing.subnetwork import Subnetwork

if TYPE_CHECKING:  # it imports DeepSpeed, which must not happen before the processes start
    from est_ds.engine.pipe_clock import PipeShares

MicroBatch = tuple[Inputs, Labels]


def token_loss(logits_BTV: Tensor, labels: Labels) -> Tensor:
    """Cross-entropy summed over the tokens that count, over their number: nats per token.

    The number is B * T, or the divisor given with the labels. It does not depend on the labels
    themselves, so that micro-batches may be averaged in any grouping (a padded batch counts for
    what it holds). An infinite loss, whose gradient may be finite, gets one that is no number: the
    norm of the gradients alone then tells every rank that the step must not be applied.
    """
    labels_BT, divisor = labels if isinstance(labels, tuple) else (labels, labels.numel())
    losses = cross_entropy(
        logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=-100, reduction="sum"
    )
    loss = losses / divisor
    return loss * (1.0 + 0.0 * loss.detach())


def adamw(parameters: Iterable[nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with two groups: matrices decay, norms and biases do not.

    Every pipe stage has both groups, even if one held nothing: DeepSpeed reduces norms group by
    group, and hangs where stages differ in their number.
    """
    matrices, vectors = [], []
    for parameter in parameters:
        # ZeRO 3 has flattened what it has cut into shares.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(shape) >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kind = FreezingAdamW if settings.inactive == "freeze" else torch.optim.AdamW
    return kind(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
    )


class Engine(ABC):
    """A DeepSpeed engine, its slicing and its coordinates.

    Attributes:
        subnetwork: slicing on the layers that live in this process.
        layers: these layers, by their index in the plan.
        fragments: weights and moments that live in this process, as no layout has cut them.
        replica: this process's data-parallel rank.
        num_replicas: data-parallel size.
    """

    subnetwork: Subnetwork
    layers: dict[int, nn.Module]
    fragments: Fragments
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

    def check_copies(self, step: int) -> None:
        """Compares what several processes hold copies of; every process calls it.

        Args:
            step: steps done.

        Raises:
            Failure: copies differ; all processes raise it.
        """

    def pipe_shares(self) -> PipeShares | None:
        """How busy the pipe stages were since the last call; None without a pipeline. Every
        process calls it."""
        return None

    @property
    def layout(self) -> dict[str, int]:
        return self.config.layout(self.num_replicas * self.config.parallel.pipe)

    @property
    def grad_norm(self) -> float:
        """Global norm of the last step's gradients before clipping.

        If it is not finite, the step was not applied.
        """
        return float(self.deepspeed.get_global_grad_norm())

    def clip_over(self, group: Any | None) -> None:
        """Replaces DeepSpeed's clipping without ZeRO, which clips every pipe stage by its own norm,
        does not say the norm, and steps whatever it is.

        Args:
            group: the processes that hold the pipe stages of this replica; None: this one alone.
        """
        if self.config.parallel.zero == 0:
            engine = self.deepspeed
            engine.clip_fp32_gradients = lambda: None
            engine.optimizer.step = partial(_clipped_step, engine, group, engine.optimizer.step)

    def grow(self, growth: Growth) -> None:
        """Copies layers and adds fresh ones, weights and moments. Every process calls it."""
        grow(self.fragments, self.hf_config, self.family, self.config.seed, growth)

    def compile_layers(self) -> None:
        """Compiles each layer by itself: one graph serves all layers, and all plans of a phase."""
        if self.config.compile:
            for layer in self.layers.values():
                layer.compile()

    def set_learning_rate(self, rate: float) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate

    def set_steps_done(self, steps: int) -> None:
        """Sets DeepSpeed's counters, which it shows to its monitor."""
        self.deepspeed.global_steps = steps
        self.deepspeed.global_samples = steps * self.config.batch.global_
        self.deepspeed.micro_steps = steps * self.deepspeed.gradient_accumulation_steps()

    def write_events(self, events: dict[str, float], samples: int) -> None:
        """Sends figures to DeepSpeed's monitor (TensorBoard and whatever else is configured)."""
        if self.deepspeed.monitor.enabled:
            self.deepspeed.monitor.write_events([(k, v, samples) for k, v in events.items()])


def _clipped_step(engine: Any, group: Any | None, step: Callable[[], None]) -> None:
    gradients = [
        p.grad
        for p in engine.module.parameters()
        if p.grad is not None and not getattr(p, "ds_pipe_replicated", False)
    ]
    # In float64, as under ZeRO: in float32 a CPU is 0.5 % off for TinyLlama's embedding.
    squares = torch.zeros((), dtype=torch.float64, device=engine.device)
    for gradient in gradients:
        squares += torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
    if group is not None:
        dist.all_reduce(squares, group=group)
    norm = engine._global_grad_norm = squares.sqrt().float()
    if not norm.isfinite():
        return
    if limit := engine.gradient_clipping():
        torch.nn.utils.clip_grads_with_norm_(engine.module.parameters(), limit, norm)
    step()


def start_deepspeed(module: nn.Module, config: RunConfig, settings: dict[str, Any]) -> Any:
    """The DeepSpeed engine around a module, with the run's AdamW and DeepSpeed's `settings`."""
    import deepspeed
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

    # DeepSpeed casts the whole module to bf16; rotary frequencies must survive that.
    buffers = {n: b.clone() for n, b in module.named_buffers() if b.dtype == torch.float32}
    with ExitStack() as stack:
        stack.enter_context(quiet())
        if config.parallel.zero:
            # For bf16 and ZeRO 1 DeepSpeed would take its BF16_Optimizer, which reduces the
            # gradients of skipped layers too and fails where a pipe stage skips all its layers.
            # Its ZeRO optimizer does the same with fp32 accumulation, without either.
            choose = patch.object(
                DeepSpeedEngine, "_do_optimizer_sanity_check", lambda *_: ZERO_OPTIMIZATION
            )
            stack.enter_context(choose)
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw(module.parameters(), config.optimizer),
            config=settings,
            dist_init_required=False,
        )
    _name_errors(engine.monitor, settings["tensorboard"]["output_path"])
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        setattr(parent, leaf, buffer.to(getattr(parent, leaf).device))
    return engine


def _name_errors(monitor: Any, folder: str) -> None:
    """TensorBoard writes on a thread, and raises its error, which names no file, where the next
    figures come: that is enough to be said of it."""
    write_events = monitor.write_events

    def naming_the_folder(events: list) -> None:
        with naming(folder):
            write_events(events)

    def say_others(died: threading.ExceptHookArgs) -> None:
        if not issubclass(died.exc_type, OSError):
            threading.__excepthook__(died)

    monitor.write_events = naming_the_folder
    threading.excepthook = say_others
