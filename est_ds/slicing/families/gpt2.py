"""GPT-2: one fused projection to q, k and v, weights stored as [in, out], learned positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, arange, nn

from est_ds.errors import UserError
from est_ds.plans.shape import ModelShape
from est_ds.plans.shapes import gpt2_shape
from est_ds.slicing.families.base import (
    Family,
    Follower,
    Passed,
    Piece,
    Slot,
    SubnetworkSize,
    causal_mask,
    passed,
    taken,
    tied_to,
)
from est_ds.slicing.leaf import SkippableAttention, SkippableMlp


class Gpt2(Family):
    model_types = ("gpt2",)
    head_size_from = "n_embd / n_head"

    def shape(self, config: Any) -> ModelShape:
        return gpt2_shape(config)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.transformer.h)

    def slots(self, layer: nn.Module) -> tuple[Slot, ...]:
        attention, mlp = layer.attn, layer.mlp
        size = attention.head_dim
        width = Follower(attention, "split_size", lambda heads, groups: heads * size)
        return (
            Slot(
                qkv_rows=((attention.c_attn, size),),
                columns=((attention.c_proj, size),),
                followers=(width,),
                skippable=((attention, SkippableAttention),),
            ),
            Slot(
                rows=((mlp.c_fc, 1),),
                columns=((mlp.c_proj, 1),),
                skippable=((mlp, SkippableMlp),),
            ),
        )

    def attentions(self, layer: nn.Module) -> tuple[nn.Module, ...]:
        return (layer.attn,)

    def pieces(self, config: Any) -> list[Piece]:
        layers = [
            Piece((f"transformer.h.{i}",), _layer, layer=i) for i in range(config.num_hidden_layers)
        ]
        source = "transformer.wte.weight" if config.tie_word_embeddings else None
        return [
            Piece(
                ("transformer.wte", "transformer.wpe", "transformer.drop"),
                _embed,
                tied=tied_to(source, "transformer.wte.weight"),
            ),
            *layers,
            Piece(("transformer.ln_f", "lm_head"), _head, tied=tied_to(source, "lm_head.weight")),
        ]

    def resized(self, config: Any, size: SubnetworkSize) -> dict[str, Any]:
        num_layers = len(size.layers)
        if config.scale_attn_by_inverse_layer_idx and size.layers != tuple(range(num_layers)):
            raise UserError(
                "model.scale_attn_by_inverse_layer_idx=True divides the attention scores of a "
                "layer by its number, and layers behind a gap would get another number; keep the "
                "first layers, without a gap."
            )
        return {"n_layer": num_layers, "n_inner": size.columns}


def _embed(words: nn.Module, places: nn.Module, drop: nn.Module, x: Passed) -> Passed:
    ids_BT, positions_BT = taken(x)
    if positions_BT is None:
        own = arange(ids_BT.shape[1], device=ids_BT.device)[None]
    else:
        own = positions_BT
    return passed(drop(words(ids_BT) + places(own)), positions_BT)


def _layer(layer: nn.Module, x: Passed) -> Passed:
    x_BTH, positions_BT = taken(x)
    # Without a mask attention is causal by the module's own flag, as in the whole model.
    mask = None if positions_BT is None else causal_mask(layer.attn.config, x_BTH, positions_BT)
    return passed(layer(x_BTH, attention_mask=mask), positions_BT)


def _head(norm: nn.Module, head: nn.Module, x: Passed) -> Tensor:
    return head(norm(taken(x)[0]))
