"""The plain ZeRO engine (stages 0 to 2) around the whole Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from est_ds.config import RunConfig
from est_ds.engine import base, setup
from est_ds.model import build_model, count_parameters
from est_ds.engine.growing import LayerStates
from est_ds.engine.settings import deepspeed_config
from est_ds.plans.shape import ModelShape
from est_ds.runtime import World
from est_ds.slicing.families.base import Family
from est_ds.slicing.subnetwork import Subnetwork


class ZeroEngine(base.Engine):
    """Every process holds the whole model; ZeRO shards optimizer state and gradients."""

    def __init__(
        self,
        config: RunConfig,
        hf_config: Any,
        family: Family,
        shape: ModelShape,
        world: World,
        tensorboard_dir: str,
    ) -> None:
        import deepspeed

        self.config, self.replica, self.num_replicas = config, world.rank, world.size
        model = build_model(hf_config, config.seed)
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.hf_config, self.family = hf_config, family
        self.layers = dict(enumerate(family.layers(model)))
        self.subnetwork = Subnetwork(family, shape, self.layers)
        buffers = base.keep_float32_buffers(model)
        with setup.quiet():
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=base.adamw(model.parameters(), config.optimizer),
                config=deepspeed_config(
                    config,
                    data_parallel=world.size,
                    parameters=count_parameters(model),
                    tensorboard_dir=tensorboard_dir,
                ),
                dist_init_required=False,
            )
        base.restore_float32_buffers(model, buffers)
        self.clip_over(None)
        self.layer_states = LayerStates(self.deepspeed, self.layers)

    def train_batch(self, batches: Iterator[base.MicroBatch]) -> float:
        self.deepspeed.train()
        total = torch.zeros((), device=self.deepspeed.device)
        count = self.deepspeed.gradient_accumulation_steps()
        for _ in range(count):
            loss = self._loss(*next(batches))
            total += loss.detach() / count
            self.deepspeed.backward(loss)
            self.deepspeed.step()
        return self._mean_over_replicas(total)

    @torch.no_grad()
    def mean_loss(self, batches: list[base.MicroBatch]) -> float:
        self.deepspeed.eval()
        losses = [self._loss(*batch) for batch in batches]
        return self._mean_over_replicas(torch.stack(losses).mean())

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.deepspeed.module.state_dict().items()

    def _loss(self, inputs: base.Inputs, labels: base.Labels) -> Tensor:
        inputs, labels = (_moved(part, self.deepspeed.device) for part in (inputs, labels))
        ids = inputs if isinstance(inputs, tuple) else (inputs,)
        named = dict(zip(("input_ids", "decoder_input_ids"), ids))
        return base.token_loss(self.deepspeed(**named, use_cache=False).logits, labels)

    def _mean_over_replicas(self, value: Tensor) -> float:
        import deepspeed.comm as comm

        comm.all_reduce(value)
        return (value / self.num_replicas).item()


def _moved(part: Tensor | tuple[Tensor, ...], device: torch.device) -> Tensor | tuple[Tensor, ...]:
    if isinstance(part, tuple):
        return tuple(tensor.to(device) for tensor in part)
    return part.to(device)
