"""The pipeline engine: pipe stages of whole layers, ZeRO 0 or 1 over the replicas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor, nn

import deepspeed
from est_ds.config import RunConfig
from est_ds.engine import base, setup
from est_ds.engine.layout import pipe_cuts
from est_ds.engine.settings import deepspeed_config
from est_ds.model import count_parameters, empty_model, initialise
from est_ds.plans.methods.base import Method
from est_ds.runtime import World
from est_ds.slicing.families.base import Family, Piece
from est_ds.slicing.subnetwork import Subnetwork


class PieceModule(nn.Module):
    """A piece of the model with its own modules, initialised when a pipe stage builds it."""

    def __init__(self, model: nn.Module, piece: Piece, seed: int, checkpointing: bool) -> None:
        super().__init__()
        initialise(model, piece.modules, seed)
        held = [model.get_submodule(path) for path in piece.modules]
        self.held = nn.ModuleList(held)
        self.piece = piece
        if checkpointing and piece.layer is not None:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, x: Tensor) -> Tensor:
        return self.piece.forward(*self.held, x)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights by their Hugging Face names."""
        for path, module in zip(self.piece.modules, self.held):
            for name, tensor in module.state_dict().items():
                yield f"{path}.{name}", tensor


class CutPipeline(PipelineModule):
    """A pipeline cut at given places."""

    def __init__(self, layers: list[LayerSpec], cuts: list[int], **kwargs: Any) -> None:
        # Assigned before the module's own start, which then cuts.
        object.__setattr__(self, "_cuts", cuts)
        super().__init__(layers, **kwargs)

    def _partition_layers(self, method: str = "given") -> None:
        self.parts = self._cuts
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])


class PipelineEngine(base.Engine):
    """Every process holds one pipe stage of one replica."""

    def __init__(
        self,
        config: RunConfig,
        hf_config: Any,
        family: Family,
        method: Method,
        world: World,
        tensorboard_dir: str,
    ) -> None:
        self.config = config
        pipe = config.parallel.pipe
        self.num_replicas = config.data_parallel(world.size)
        model = empty_model(hf_config)
        pieces = family.pieces(hf_config)
        specs = [
            LayerSpec(PieceModule, model, piece, config.seed, config.activation_checkpointing)
            for piece in pieces
        ]
        with setup.quiet():
            self.pipeline = CutPipeline(
                specs,
                _piece_cuts(pieces, pipe_cuts(method, pipe)),
                topology=PipeDataParallelTopology(num_pp=pipe, num_dp=self.num_replicas),
                loss_fn=base.token_loss,
            )
            self._pieces = list(self.pipeline.forward_funcs)
            layers = {
                p.piece.layer: p.held[0] for p in self._pieces if p.piece.layer is not None
            }
            self.subnetwork = Subnetwork(family, method.shape, layers)
            buffers = base.keep_float32_buffers(self.pipeline)
            self.deepspeed, *_ = deepspeed.initialize(
                model=self.pipeline,
                optimizer=base.adamw(self.pipeline.parameters(), config.optimizer),
                config=deepspeed_config(
                    config,
                    data_parallel=self.num_replicas,
                    parameters=count_parameters(self.pipeline),
                    tensorboard_dir=tensorboard_dir,
                ),
                dist_init_required=False,
            )
            base.restore_float32_buffers(self.pipeline, buffers)
        self.clip_over(self.deepspeed.grid.get_pipe_parallel_group())
        self.replica = self.deepspeed.grid.get_data_parallel_rank()

    def train_batch(self, batches: Iterator[base.MicroBatch]) -> float:
        if self.config.parallel.zero == 0:
            # Without ZeRO and with one replica DeepSpeed leaves the gradients of what a plan leaves
            # out unset, and AdamW then skips them: no decay of their moments.
            for parameter in self.pipeline.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return self.deepspeed.train_batch(batches).item()

    def mean_loss(self, batches: list[base.MicroBatch]) -> float:
        loss = self.deepspeed.eval_batch(iter(batches), num_micro_batches=len(batches))
        return loss.item()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for piece in self._pieces:
            yield from piece.named_weights()


def _piece_cuts(pieces: list[Piece], layer_cuts: list[int]) -> list[int]:
    """Cuts among pieces: before each stage's first layer, the ends taking what surrounds."""
    at = {piece.layer: i for i, piece in enumerate(pieces) if piece.layer is not None}
    return [0, *(at[cut] for cut in layer_cuts[:-1]), len(pieces)]
