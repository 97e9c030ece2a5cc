"""Mamba and Mamba2: one state-space mixer a layer, and neither attention nor MLP.

What a plan calls columns are a Mamba's inner channels and a Mamba2's heads. Either is convolved,
scanned and gated on its own, so that the kept ones compute what they would among all. What binds
them together:

- Mamba reads step sizes, B and C from all inner channels (`x_proj`): like the output, what is read
  is multiplied by n / k. It is as if the channels were dropped behind the convolution.
- Mamba2 projects B and C from the residual stream, for each of its groups (`n_groups`): they are
  always kept, and every group keeps equally many heads. The gated norm in front of `out_proj` takes
  its mean over a group's channels: over the kept ones.

A mixer's forward reads its own parameters and those of its convolution (and of Mamba's `dt_proj`)
as they are, without running the modules. It is the library's own one in torch: the fused kernels
of the package mamba_ssm would pass by what is sliced.

Shapes: B batch, T tokens, H hidden.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from torch import Tensor, nn

from est_ds.errors import UserError
from est_ds.plans.shape import ModelShape
from est_ds.plans.shapes import mamba_shape
from est_ds.slicing.families.base import Family, Follower, Piece, Slot, SubnetworkSize, tied_to
from est_ds.slicing.leaf import Rows, SkippableLayer, SkippableMlp

WORDS = "backbone.embeddings.weight"
# Of which there must be at least one.
COUNTS = (
    "hidden_size",
    "expand",
    "intermediate_size",
    "state_size",
    "conv_kernel",
    "time_step_rank",
    "num_heads",
    "head_dim",
    "n_groups",
    "chunk_size",
)


class SkippableBlock(SkippableLayer):
    """A block makes the residual stream float32, if the config says so, also where it is skipped:
    a pipe stage sends states of one type."""

    def est_skip(self, hidden_states: Tensor, *args, **kwargs):
        return hidden_states.float() if self.residual_in_fp32 else hidden_states


class Mamba(Family):
    model_types = ("mamba", "mamba2")
    attention = "eager"  # there is none; the library refuses other words
    separable = False
    skippable = SkippableBlock

    def shape(self, config: Any) -> ModelShape:
        _check(config)
        return mamba_shape(config)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.backbone.layers)

    def slots(self, layer: nn.Module) -> tuple[Slot, ...]:
        mixer = layer.mixer
        return (_slot_of_heads(mixer) if hasattr(mixer, "n_groups") else _slot_of_channels(mixer),)

    def attentions(self, layer: nn.Module) -> tuple[nn.Module, ...]:
        return ()

    def read_elsewhere(self, layer: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
        """Some only to hand them to the fused kernels, if there were any."""
        inner = [module for module in layer.mixer.children() if module is not layer.mixer.in_proj]
        return [(layer.mixer, p) for module in inner for p in module.parameters()]

    def pieces(self, config: Any) -> list[Piece]:
        layers = [
            Piece((f"backbone.layers.{i}",), _layer, layer=i)
            for i in range(config.num_hidden_layers)
        ]
        source = WORDS if config.tie_word_embeddings else None
        return [
            Piece(("backbone.embeddings",), _embed, tied=tied_to(source, WORDS)),
            *layers,
            Piece(("backbone.norm_f", "lm_head"), _head, tied=tied_to(source, "lm_head.weight")),
        ]

    def resized(self, config: Any, size: SubnetworkSize) -> dict[str, Any]:
        fields = {"num_hidden_layers": len(size.layers)}
        if config.model_type == "mamba":
            return fields | {"intermediate_size": size.columns}
        hidden, width = config.hidden_size, config.head_dim
        expand, rest = divmod(size.columns * width, hidden)
        if rest:
            raise UserError(
                f"model_type {config.model_type!r}: {size.columns} columns (heads, {width} wide) "
                f"are no multiple of hidden_size={hidden}, which Hugging Face wants (expand); keep "
                f"a multiple of {hidden // math.gcd(hidden, width)}, or use --layers alone."
            )
        return fields | {"num_heads": size.columns, "expand": expand}


def _check(config: Any) -> None:
    """Checks what the library does not, or passes over.

    Raises:
        UserError: a count is none, groups do not divide the heads, or training could not honour it.
    """
    for field in COUNTS:
        value = getattr(config, field, 1)
        if isinstance(value, int) and value < 1:
            raise UserError(f"model.{field}={value}: there must be at least 1.")
    if config.model_type == "mamba2" and config.num_heads % config.n_groups:
        raise UserError(
            f"model.n_groups={config.n_groups} does not divide model.num_heads="
            f"{config.num_heads}; use a divisor."
        )
    if getattr(config, "use_mambapy", False):
        raise UserError(
            "model.use_mambapy=True is not supported: the library's own loop scans the layers; "
            "remove it, or set false."
        )
    scheme = getattr(config, "time_step_init_scheme", "random")
    if scheme not in ("random", "constant"):
        raise UserError(
            f"model.time_step_init_scheme={scheme!r} is not known; use random or constant."
        )
    if importlib.util.find_spec("mamba_ssm"):
        raise UserError(
            f"model.model_type={config.model_type!r} does not work where the package mamba_ssm is "
            f"installed: its fused kernels pass by what is sliced; uninstall it."
        )


def _slot_of_channels(mixer: nn.Module) -> Slot:
    """Of a Mamba."""
    inner = Rows(mixer.intermediate_size, 1)
    return Slot(
        mixed_rows=((mixer.in_proj, (inner, inner)),),  # channels, and their gates
        inner_columns=((mixer.x_proj, 1),),
        held=((mixer, (inner,)), (mixer.conv1d, (inner,)), (mixer.dt_proj, (inner,))),
        columns=((mixer.out_proj, 1),),
        skippable=((mixer, SkippableMlp),),
    )


def _slot_of_heads(mixer: nn.Module) -> Slot:
    """Of a Mamba2."""
    size, groups = mixer.head_dim, mixer.n_groups
    steps, channels = Rows(mixer.num_heads, 1), Rows(mixer.intermediate_size, size)
    shared = Rows(2 * groups * mixer.ssm_state_size, 0)  # B and C of every group
    return Slot(
        mixed_rows=((mixer.in_proj, (channels, channels, shared, steps)),),  # gates first
        held=((mixer, (steps,)), (mixer.conv1d, (channels, shared))),
        norms=((mixer.norm, size),),
        columns=((mixer.out_proj, size),),
        followers=(
            Follower(mixer, "num_heads", lambda heads, _: heads),
            Follower(mixer, "intermediate_size", lambda heads, _: heads * size),
            Follower(mixer, "conv_dim", lambda heads, _: heads * size + shared.number),
            Follower(mixer.norm, "group_size", lambda heads, _: heads * size // groups),
        ),
        skippable=((mixer, SkippableMlp),),
    )


def _embed(embedding: nn.Module, ids_BT: Tensor) -> Tensor:
    return embedding(ids_BT)


def _layer(layer: nn.Module, states_BTH: Tensor) -> Tensor:
    return layer(states_BTH)


def _head(norm: nn.Module, head: nn.Module, states_BTH: Tensor) -> Tensor:
    return head(norm(states_BTH).to(head.weight.dtype)).float()
