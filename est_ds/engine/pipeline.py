"""The pipeline engine: pipe stages of whole layers, ZeRO 0 or 1 over the replicas."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor, nn

from est_ds.design import Design
from est_ds.engine import base, start
from est_ds.engine.fragments import Fragments
from est_ds.engine.loss import RowLoss
from est_ds.engine.optimizer import fill_missing_gradients
from est_ds.engine.patches import clip_over_stages, reduce_alike, replace_instructions
from est_ds.engine.pipe_clock import PipeClock, PipeShares
from est_ds.engine.settings import deepspeed_config
from est_ds.engine.ties import Ties
from est_ds.ranks.world import World
from est_ds.slicing.build import count_parameters, empty_model
from est_ds.slicing.dropout import address_dropout
from est_ds.slicing.families.base import Piece
from est_ds.slicing.subnetwork import Subnetwork


class PieceModule(nn.Module):
    """A piece of the model with its own modules, initialised when a pipe stage builds it."""

    def __init__(self, design: Design, model: nn.Module, piece: Piece, checkpointing: bool) -> None:
        super().__init__()
        design.begin(model, piece.modules)
        held = [model.get_submodule(path) for path in piece.modules]
        self.held = nn.ModuleList(held)
        self.piece = piece
        if checkpointing and piece.layer is not None:
            model.activation_checkpointing_enable({"use_reentrant": False})

    def forward(self, x: Tensor) -> Tensor:
        return self.piece.forward(*self.held, x)

    def parameters_by_common_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by their Hugging Face names; a tied one by that of the one it is tied to."""
        for path, module in zip(self.piece.modules, self.held):
            for name, parameter in module.named_parameters():
                yield self.piece.tied.get(f"{path}.{name}", f"{path}.{name}"), parameter


class CutPipeline(PipelineModule):
    """A pipeline cut at given places."""

    def __init__(self, layers: list[LayerSpec], cuts: list[int], **kwargs: Any) -> None:
        # Assigned before the module's own start, which then cuts.
        object.__setattr__(self, "_cuts", cuts)
        super().__init__(layers, **kwargs)

    def _partition_layers(self, method: str = "given") -> None:
        self.parts = self._cuts
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def tie(self, pieces: list[Piece]) -> Ties:
        """Finds the parameters that pieces of several pipe stages hold in common."""
        holders: dict[str, set[int]] = {}
        for i, piece in enumerate(pieces):
            for common in piece.tied.values():
                holders.setdefault(common, set()).add(self.stage_owner(i))
        return Ties(holders, self._grid, self.parameters_by_common_name())

    def parameters_by_common_name(self) -> dict[str, nn.Parameter]:
        """The parameters of this pipe stage by their Hugging Face names."""
        return dict(
            pair for module in self.forward_funcs for pair in module.parameters_by_common_name()
        )


class PipelineEngine(base.Engine):
    """Every process holds one pipe stage of one replica."""

    def __init__(self, design: Design, world: World) -> None:
        config, hf_config, family = design.config, design.hf_config, design.family
        self.config = config
        pipe = config.parallel.pipe
        self.num_replicas = config.data_parallel(world.size)
        model = empty_model(hf_config)
        pieces = family.pieces(hf_config)
        specs = [
            LayerSpec(PieceModule, design, model, piece, config.activation_checkpointing)
            for piece in pieces
        ]
        accumulation = config.batch.accumulation(self.num_replicas)
        self.loss = RowLoss.of(design.objective, model, accumulation)
        with start.quiet():
            self.pipeline = CutPipeline(
                specs,
                _piece_cuts(pieces, design.cuts),
                topology=PipeDataParallelTopology(num_pp=pipe, num_dp=self.num_replicas),
                loss_fn=self.loss,
            )
            self._ties = self.pipeline.tie(pieces)
            self.design = design
            self.layers = {
                p.piece.layer: p.held[0]
                for p in self.pipeline.forward_funcs
                if p.piece.layer is not None
            }
            self.subnetwork = Subnetwork(
                family, design.method.shape, self.layers, masked=design.method.masked
            )
            if design.dropout:
                address_dropout(model, family, config.seed_of("method"), self.subnetwork)
        settings = deepspeed_config(
            config,
            data_parallel=self.num_replicas,
            parameters=count_parameters(self.pipeline),
        )
        named = self.pipeline.parameters_by_common_name()
        self.deepspeed = base.start_deepspeed(
            self.pipeline, design, settings, named, self.subnetwork
        )
        self._ties.take_over(self.deepspeed)
        self.attend_by_document(model)
        if design.method.by_micro_batch and config.parallel.zero == 1:
            reduce_alike(self.deepspeed, self.subnetwork.idle_parameters)
        self._clock = PipeClock(self.deepspeed)
        self._take_turns()
        grid = self.deepspeed.grid
        if self.config.compile:
            self.compile_layers()
        if config.parallel.zero == 0:
            clip_over_stages(self.deepspeed, grid.get_pipe_parallel_group())
        self.replica = grid.get_data_parallel_rank()
        is_first = {n: not getattr(p, "ds_pipe_replicated", False) for n, p in named.items()}
        self.fragments = Fragments(self.deepspeed, named, self.replica, self.num_replicas, is_first)

    def train_batch(self, batches: Iterator[base.MicroBatch]) -> float:
        if self.config.parallel.zero == 0:
            fill_missing_gradients(self.pipeline)
        self._passes = dict.fromkeys(self._passes, 0)
        began = time.perf_counter()
        loss = self.deepspeed.train_batch(batches).item()
        self._clock.step_done(time.perf_counter() - began)
        return loss

    def _take_turns(self) -> None:
        """Has each pass of a training step find the plan of its own micro-batch, of which a stage
        has several under way, and each of the last stage its labels. Passes of a kind follow the
        order of the micro-batches."""
        self._passes = {ForwardPass: 0, BackwardPass: 0}

        def in_turn(kind: type) -> Callable[..., None]:
            execute = self.deepspeed._INSTRUCTION_MAP[kind]

            def run(engine: Any, buffer_id: int) -> None:
                if engine.module.training:
                    self.subnetwork.turn_to(self.first_micro_batch + self._passes[kind])
                    self._passes[kind] += 1
                if kind is ForwardPass and engine.is_last_stage():
                    self.loss.expect(engine.pipe_buffers["labels"][buffer_id])
                execute(engine, buffer_id)

            return run

        replace_instructions(self.deepspeed, {kind: in_turn(kind) for kind in self._passes})

    def mean_loss(self, batches: list[base.MicroBatch]) -> float:
        loss = self.deepspeed.eval_batch(iter(batches), num_micro_batches=len(batches))
        self._clock.drop()
        return loss.item()

    def check_copies(self, step: int) -> None:
        self._ties.check(self.fragments, step)

    def pipe_shares(self) -> PipeShares | None:
        return self._clock.shares()


def _piece_cuts(pieces: list[Piece], layer_cuts: list[int]) -> list[int]:
    """Cuts among pieces: before each stage's first layer, the ends taking what surrounds."""
    at = {piece.layer: i for i, piece in enumerate(pieces) if piece.layer is not None}
    return [0, *(at[cut] for cut in layer_cuts[:-1]), len(pieces)]
