"""The plain ZeRO engine (stages 0 to 3) around the whole Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from est_ds.design import Design
from est_ds.engine import base, start
from est_ds.engine.fragments import Fragments
from est_ds.engine.loss import RowLoss
from est_ds.engine.patches import (
    clip_over_stages,
    forget_gradients,
    forget_order,
    gather_whole,
    reduce_alike,
)
from est_ds.engine.settings import deepspeed_config
from est_ds.ranks.world import World
from est_ds.slicing.build import count_parameters, empty_model
from est_ds.slicing.dropout import address_dropout
from est_ds.slicing.families.base import Family
from est_ds.slicing.subnetwork import Subnetwork


class ZeroEngine(base.Engine):
    """Every process holds the whole model, or under ZeRO 3 its share of every parameter."""

    def __init__(self, design: Design, world: World) -> None:
        config, hf_config, family = design.config, design.hf_config, design.family
        self.config, self.replica, self.num_replicas = config, world.rank, world.size
        model = empty_model(hf_config)
        settings = deepspeed_config(
            config,
            data_parallel=world.size,
            parameters=count_parameters(model),
        )
        if config.parallel.zero == 3:
            _begin_sharded(model, design, settings)
        else:
            design.begin(model, [""])
        if config.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.design = design
        self.loss = RowLoss.of(design.objective, model, config.batch.accumulation(world.size))
        self.layers = dict(enumerate(family.layers(model)))
        self.subnetwork = Subnetwork(
            family, design.method.shape, self.layers, masked=design.method.masked
        )
        if design.dropout:
            address_dropout(model, family, config.seed_of("method"), self.subnetwork)
        self._gathers_whole = design.method.by_micro_batch and config.parallel.zero == 3
        if self._gathers_whole:
            gather_whole(self.layers.values())
        named = dict(model.named_parameters())
        self.deepspeed = base.start_deepspeed(model, design, settings, named, self.subnetwork)
        self.attend_by_document(model)
        if config.parallel.zero == 3:
            _gather_for_readers(family, self.layers.values())
        if design.method.by_micro_batch and config.parallel.zero in (1, 2):
            reduce_alike(self.deepspeed, self.subnetwork.idle_parameters)
        if self.config.compile:
            self.compile_layers()
        if config.parallel.zero == 0:
            clip_over_stages(self.deepspeed, None)
        self._traced: tuple[bool, tuple[nn.Module, ...]] | None = None
        self.fragments = Fragments(self.deepspeed, named, self.replica, self.num_replicas)

    def train_batch(self, batches: Iterator[base.MicroBatch]) -> float:
        self.deepspeed.train()
        self._forget_trace()
        total = torch.zeros((), device=self.deepspeed.device)
        count = self.deepspeed.gradient_accumulation_steps()
        for i in range(count):
            self.subnetwork.turn_to(self.first_micro_batch + i)
            loss = self._loss(*next(batches))
            total += loss.detach() / count
            self.deepspeed.backward(loss)
            self.deepspeed.step()
        parallel = self.config.parallel
        forget_gradients(self.deepspeed.optimizer, parallel.zero, parallel.offload)
        return self._mean_over_replicas(total)

    @torch.no_grad()
    def mean_loss(self, batches: list[base.MicroBatch]) -> float:
        self.deepspeed.eval()
        self._forget_trace()
        losses = [self._loss(*batch) for batch in batches]
        return self._mean_over_replicas(torch.stack(losses).mean())

    def _forget_trace(self) -> None:
        """Where other layers run than before, lets ZeRO 3 forget in what order it gathered them:
        it would gather skipped ones too, until it noticed."""
        if self.config.parallel.zero < 3:
            return
        skipped = () if self._gathers_whole else self.subnetwork.skipped
        runs = (self.deepspeed.training, skipped)
        if runs != self._traced:
            forget_order(self.deepspeed.optimizer)
            self._traced = runs

    def _loss(self, inputs: base.Inputs, labels: base.Labels) -> Tensor:
        inputs, labels = (_moved(part, self.deepspeed.device) for part in (inputs, labels))
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        named = self.design.family.named_inputs(given, self.deepspeed.module.config)
        self.loss.expect(labels)
        return self.loss(self.deepspeed(**named, use_cache=False).logits, labels)

    def _mean_over_replicas(self, value: Tensor) -> float:
        import deepspeed.comm as comm

        comm.all_reduce(value)
        return (value / self.num_replicas).item()


def _begin_sharded(model: nn.Module, design: Design, settings: dict[str, Any]) -> None:
    """Gives the model what the run begins with, every parameter cut into shares as soon as its
    layer has it, so that no process holds the whole, but where drawn weights are tied."""
    import deepspeed

    config, hf_config = design.config, design.hf_config
    paths = [path for piece in design.family.pieces(hf_config) for path in piece.modules]
    # ZeRO++'s second sharding can be started only once.
    twice = settings["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
    if twice or model.all_tied_weights_keys or hf_config.is_encoder_decoder:
        paths = [""]
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    for path in dict.fromkeys(paths):
        module = model.get_submodule(path)
        if design.draws_nothing:  # so that no memory is written before the module is cut
            _cast(module, dtype)
        design.begin(model, [path])
        _cast(module, dtype)
        with start.quiet():
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts parameters, and not the buffers."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _gather_for_readers(family: Family, layers: Iterable[nn.Module]) -> None:
    """Has ZeRO 3 gather parameters for the other modules that read them. DeepSpeed finds out by
    itself, but not in a recomputed forward, nor where it had gathered them for something else."""
    import deepspeed

    for layer in layers:
        for reader, parameter in family.read_elsewhere(layer):
            deepspeed.zero.register_external_parameter(reader, parameter)


def _moved(part: Tensor | tuple[Tensor, ...], device: torch.device) -> Tensor | tuple[Tensor, ...]:
    if isinstance(part, tuple):
        return tuple(_moved(tensor, device) for tensor in part)
    return part.to(device, non_blocking=True)  # from the loader's pinned memory
