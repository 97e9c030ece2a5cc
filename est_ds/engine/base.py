"""What the training loop sees of an engine.

Shapes: ids and labels [B, T] (micro-batch, sequence), int64; label -100 is ignored. A micro-batch
is inputs (ids; of an encoder-decoder also the decoder's; where documents are kept apart also
positions) and labels (alone, or with a divisor).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from est_ds.config.run_config import RunConfig
from est_ds.cost.documents import by_document
from est_ds.data.loader import Inputs, Portion
from est_ds.data.objectives.loss import Labels
from est_ds.design import Design
from est_ds.engine.events import count_steps, forget_after
from est_ds.engine.fragments import Fragments
from est_ds.engine.growing import grow
from est_ds.engine.loss import RowLoss
from est_ds.engine.moved import Sample, Sampler
from est_ds.engine.optimizer import adamw
from est_ds.engine.patches import keep_errors_of_tensorboard, zero_optimizer_for_bf16
from est_ds.engine.reduction import pass_once
from est_ds.engine.start import quiet
from est_ds.plans.growth import Growth
from est_ds.ranks.gather import largest
from est_ds.slicing.build import embedding_names, empty_model
from est_ds.slicing.documents import attend_by_document, has_kernel
from est_ds.slicing.families.base import layer_paths
from est_ds.slicing.subnetwork import Subnetwork

if TYPE_CHECKING:  # it imports DeepSpeed, which must not happen before the processes start
    from est_ds.engine.pipe_clock import PipeShares

MicroBatch = tuple[Inputs, Labels]


class Engine(ABC):
    """A DeepSpeed engine, its slicing and its coordinates.

    Attributes:
        subnetwork: slicing on the layers that live in this process.
        layers: these layers, by their index in the plan.
        loss: the objective's; a pipeline's last stages compute it, and every other process.
        fragments: weights and moments that live in this process, as no layout has cut them.
        replica: this process's data-parallel rank.
        num_replicas: data-parallel size.
    """

    subnetwork: Subnetwork
    layers: dict[int, nn.Module]
    loss: RowLoss
    fragments: Fragments
    design: Design
    replica: int
    num_replicas: int
    config: RunConfig
    deepspeed: Any

    @abstractmethod
    def train_batch(self, batches: Iterator[MicroBatch]) -> float:
        """One optimizer step over this replica's micro-batches; the mean loss of all replicas."""

    @abstractmethod
    def mean_loss(self, batches: list[MicroBatch]) -> float:
        """The mean of the objective's loss over all replicas' micro-batches, without gradients."""

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

    def memory_peak_bytes(self) -> int | None:
        """The most that tensors took of any process's GPU since the last call; None on CPUs. Every
        process calls it."""
        if not self.on_gpu:
            return None
        peak = largest(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return peak

    @property
    def on_gpu(self) -> bool:
        """Whether the layers are on a GPU."""
        return torch.device(self.deepspeed.device).type == "cuda"

    @property
    def first_micro_batch(self) -> int:
        """Index of this replica's first micro-batch in every global batch."""
        return self.replica * self.deepspeed.gradient_accumulation_steps()

    @property
    def portion(self) -> Portion:
        """What this process's replica reads of every batch."""
        return Portion(self.replica, self.num_replicas, self.config.batch.micro)

    @property
    def layout(self) -> dict[str, int]:
        return self.config.layout(self.num_replicas * self.config.parallel.pipe)

    @property
    def grad_norm(self) -> float:
        """Global norm of the last step's gradients before clipping.

        If it is not finite, the step was not applied.
        """
        return float(self.deepspeed.get_global_grad_norm())

    def grow(self, growth: Growth) -> None:
        """Copies layers and adds new ones, weights and moments. Every process calls it."""
        grow(self.fragments, self.design, growth)

    def layer_weights(self, layers: Collection[int]) -> Sample:
        """A sample of the weights of layers as they are now; every process calls it."""
        return self._sampler.sample(layers)

    @cached_property
    def _sampler(self) -> Sampler:
        pieces = self.design.family.pieces(self.design.hf_config)
        return Sampler(self.fragments, layer_paths(pieces))

    def compile_layers(self, backend: Any = "inductor") -> None:
        """Compiles each layer by itself: one graph serves all layers, and all plans of a phase."""
        for layer in self.layers.values():
            layer.compile(backend=backend)

    def attend_by_document(self, model: nn.Module) -> None:
        """Has attention computed document by document, where that serves."""
        design, gpu = self.design, self.on_gpu
        if gpu and not has_kernel():
            return
        if by_document(self.config, design.method.shape, design.dropout, gpu):
            attend_by_document(model)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate

    def only_measure(self) -> None:
        """Makes the engine take steps that change no weight and that no monitor shows; moments
        change, so that it must not be saved any more."""
        self.set_learning_rate(0.0)
        self.deepspeed.monitor.enabled = False

    def set_steps_done(self, steps: int) -> None:
        """Sets DeepSpeed's counters, which it shows to its monitor."""
        self.deepspeed.global_steps = steps
        self.deepspeed.global_samples = steps * self.config.batch.global_
        self.deepspeed.micro_steps = steps * self.deepspeed.gradient_accumulation_steps()

    @property
    def has_monitor(self) -> bool:
        """Whether DeepSpeed shows figures to anybody."""
        return self.deepspeed.monitor.enabled

    def write_events(self, events: dict[str, float], done: int) -> None:
        """Sends figures to the monitors that `deepspeed` names.

        Args:
            done: optimizer steps done by then.
        """
        self.deepspeed.monitor.write_events([(k, v, done) for k, v in events.items()])

    def forget_events(self, done: int) -> None:
        """Hides the figures of steps after `done` in DeepSpeed's TensorBoard: they are trained
        anew."""
        forget_after(self.deepspeed.monitor, done)


def start_deepspeed(
    module: nn.Module,
    design: Design,
    settings: dict[str, Any],
    named: dict[str, nn.Parameter],
    subnetwork: Subnetwork,
) -> Any:
    """The DeepSpeed engine around a module, with the run's AdamW and DeepSpeed's `settings`.

    Args:
        named: the module's parameters by their Hugging Face names.
        subnetwork: the slicing on its layers.
    """
    import deepspeed

    config = design.config
    embeddings = []
    if config.optimizer.decay == "no_embeddings":
        names = embedding_names(empty_model(design.hf_config))
        embeddings = [parameter for name, parameter in named.items() if name in names]
    # DeepSpeed casts the whole module to bf16; rotary frequencies must survive that.
    buffers = {n: b.clone() for n, b in module.named_buffers() if b.dtype == torch.float32}
    keep_errors_of_tensorboard()
    with quiet(), zero_optimizer_for_bf16() if config.parallel.zero else nullcontext():
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw(module.parameters(), config.optimizer, embeddings),
            config=settings,
            dist_init_required=False,
        )
    pass_once(engine, config, subnetwork.kept_units)
    count_steps(engine.monitor, config.batch.global_)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        setattr(parent, leaf, buffer.to(getattr(parent, leaf).device))
    return engine
