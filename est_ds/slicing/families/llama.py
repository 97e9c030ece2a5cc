"""Llama and the families that share its module names: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from typing import Any

from torch import Tensor, arange, nn

from est_ds.plans.shape import ModelShape
from est_ds.plans.shapes import llama_shape
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


class Llama(Family):
    model_types = ("llama", "mistral", "qwen2", "qwen3")
    extra_keys = frozenset({"head_dim"})

    def shape(self, config: Any) -> ModelShape:
        return llama_shape(config)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.model.layers)

    def slots(self, layer: nn.Module) -> tuple[Slot, ...]:
        attention, mlp = layer.self_attn, layer.mlp
        size = attention.head_dim
        repeats = Follower(attention, "num_key_value_groups", lambda heads, groups: heads // groups)
        return (
            Slot(
                rows=((attention.q_proj, size),),
                group_rows=((attention.k_proj, size), (attention.v_proj, size)),
                columns=((attention.o_proj, size),),
                followers=(repeats,),
                skippable=((attention, SkippableAttention),),
            ),
            Slot(
                rows=((mlp.gate_proj, 1), (mlp.up_proj, 1)),
                columns=((mlp.down_proj, 1),),
                skippable=((mlp, SkippableMlp),),
            ),
        )

    def attentions(self, layer: nn.Module) -> tuple[nn.Module, ...]:
        return (layer.self_attn,)

    def pieces(self, config: Any) -> list[Piece]:
        layers = [
            Piece((f"model.layers.{i}", "model.rotary_emb"), _layer, layer=i)
            for i in range(config.num_hidden_layers)
        ]
        words = "model.embed_tokens.weight"
        source = words if config.tie_word_embeddings else None
        return [
            Piece(("model.embed_tokens",), _embed, tied=tied_to(source, words)),
            *layers,
            Piece(("model.norm", "lm_head"), _head, tied=tied_to(source, "lm_head.weight")),
        ]

    def resized(self, config: Any, size: SubnetworkSize) -> dict[str, Any]:
        fields = {
            "num_hidden_layers": len(size.layers),
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_value_groups,
            "head_dim": self.shape(config).layers[0][0].head_dim,
            "intermediate_size": size.columns,
        }
        if types := getattr(config, "layer_types", None):
            fields["layer_types"] = [types[i] for i in size.layers]
        return fields


def _embed(embedding: nn.Module, x: Passed) -> Passed:
    ids_BT, positions_BT = taken(x)
    return passed(embedding(ids_BT), positions_BT)


def _layer(layer: nn.Module, rotary: nn.Module, x: Passed) -> Passed:
    x_BTH, positions_BT = taken(x)
    joined = positions_BT is None
    own = arange(x_BTH.shape[1], device=x_BTH.device)[None] if joined else positions_BT
    config = layer.self_attn.config
    window = getattr(layer.self_attn, "sliding_window", getattr(config, "sliding_window", None))
    # Without a mask attention is causal by the module's own flag, as in the whole model.
    needs_mask = not joined or window is not None
    mask = causal_mask(config, x_BTH, own, window is not None) if needs_mask else None
    x_BTH = layer(x_BTH, attention_mask=mask, position_embeddings=rotary(x_BTH, own))
    return passed(x_BTH, positions_BT)


def _head(norm: nn.Module, head: nn.Module, x: Passed) -> Tensor:
    return head(norm(taken(x)[0]))
