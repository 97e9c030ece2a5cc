"""T5: encoder and decoder, whose relative position bias every layer takes for its own heads.

The plan's layers are the encoder's, then the decoder's. The first self-attention of each stack
computes the bias of all heads, [1, heads, T, T]; the layers behind share it, each keeping heads
of its own, and it must be there also when the first layer is skipped.

T5 v1.1 (`tie_word_embeddings: false`) has an output head of its own, and its decoder's states are
not scaled before it. The library keeps only the second in the config, as `scale_decoder_outputs`,
says that it ties, and leaves the head as it is where a checkpoint has one: that field tells here.

Shapes: B batch, S source and T target tokens, H hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

from est_ds.errors import UserError
from est_ds.plans.plan import Plan
from est_ds.plans.shape import ModelShape
from est_ds.plans.shapes import t5_shape
from est_ds.slicing.families.base import Family, Piece, Slot, SubnetworkSize, tied_to
from est_ds.slicing.leaf import Skippable, SkippableLayer, Slice

_HEAD = "lm_head.weight"


class BiasOfKeptHeads:
    """An attention that takes and returns the bias of all heads, and uses that of its own."""

    est_slice: Slice | None = None

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, **other):
        kept = self.est_slice
        if kept is None:
            return super().forward(hidden_states, mask, key_value_states, position_bias, **other)
        if position_bias is None:
            position_bias = self._est_whole_bias(hidden_states, key_value_states)
        of_kept = position_bias.index_select(1, kept.units)
        out, _, weights = super().forward(hidden_states, mask, key_value_states, of_kept, **other)
        return out, position_bias, weights

    def _est_whole_bias(self, queries: Tensor, keys: Tensor | None) -> Tensor:
        num_queries = queries.shape[1]
        num_keys = num_queries if keys is None else keys.shape[1]
        if self.has_relative_attention_bias:
            return self.compute_bias(num_queries, num_keys, device=queries.device)
        return queries.new_zeros(1, 1, 1, 1).expand(1, self.n_heads, num_queries, num_keys)


class SkippableBlock(Skippable):
    """A block returns its states, and the biases of its attentions for the blocks behind it."""

    def est_skip(
        self,
        hidden_states,
        attention_mask=None,
        position_bias=None,
        *of_encoder,  # its states, their mask, and the bias of the attention to them
        **other,
    ):
        bias = _bias_to_share(self.layer[0].SelfAttention, hidden_states, position_bias)
        cross_bias = of_encoder[2] if len(of_encoder) > 2 else None
        return hidden_states, bias, other.get("encoder_decoder_position_bias", cross_bias)


class SkippableSelfAttention(Skippable):
    """Norm, attention and residual."""

    def est_skip(self, hidden_states, attention_mask=None, position_bias=None, **other):
        bias = _bias_to_share(self.SelfAttention, hidden_states, position_bias)
        return hidden_states, bias, None


class SkippableCrossAttention(Skippable):
    """Norm, attention and residual."""

    def est_skip(self, hidden_states, key_value_states, mask=None, position_bias=None, **other):
        return hidden_states, position_bias, None


def _bias_to_share(attention: nn.Module, states: Tensor, bias: Tensor | None) -> Tensor | None:
    if bias is None and attention.has_relative_attention_bias:
        return attention.compute_bias(states.shape[1], states.shape[1], device=states.device)
    return bias


class T5(Family):
    model_types = ("t5",)
    auto_class = "AutoModelForSeq2SeqLM"
    separable = False
    extra_keys = frozenset({"decoder_start_token_id"})
    skippable = SkippableBlock
    reused_dropout = {
        f"{stack}.dropout": (f"{stack}.embed_tokens", f"{stack}.final_layer_norm")
        for stack in ("encoder", "decoder")
    }

    def shape(self, config: Any) -> ModelShape:
        return t5_shape(config)

    def check_section(self, section: dict[str, Any]) -> None:
        tied, scaled = (section.get(k) for k in ("tie_word_embeddings", "scale_decoder_outputs"))
        if tied is False and scaled:
            raise UserError(
                "model.tie_word_embeddings=False and model.scale_decoder_outputs=True contradict "
                "each other: T5 scales before a tied head only; remove one of them."
            )

    def untie(self, model: nn.Module) -> None:
        if _has_own_head(model.config):
            ties = {k: v for k, v in model._tied_weights_keys.items() if k != _HEAD}
            model._tied_weights_keys, model.all_tied_weights_keys = ties, dict(ties)
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))

    def rescale_drawn(self, config: Any, path: str, module: nn.Module) -> None:
        # The library draws it as wide as the embedding, for logits of width sqrt(d_model). This is
        # t5x's width (variance 1 / fan-in), and what the scaling makes of a tied head.
        if path == "lm_head" and _has_own_head(config):
            module.weight.mul_(config.d_model**-0.5)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return [*model.encoder.block, *model.decoder.block]

    def slots(self, layer: nn.Module) -> tuple[Slot, ...]:
        own, *cross, last = layer.layer
        mlp = last.DenseReluDense
        inner = (mlp.wi_0, mlp.wi_1) if hasattr(mlp, "wi_0") else (mlp.wi,)
        return (
            _attention_slot(own, own.SelfAttention, SkippableSelfAttention),
            *(_attention_slot(c, c.EncDecAttention, SkippableCrossAttention) for c in cross),
            Slot(
                rows=tuple((module, 1) for module in inner),
                columns=((mlp.wo, 1),),
                skippable=((last, SkippableLayer),),
            ),
        )

    def attentions(self, layer: nn.Module) -> tuple[nn.Module, ...]:
        own, *cross, _ = layer.layer
        return (own.SelfAttention, *(c.EncDecAttention for c in cross))

    def idle_parameters(self, layer: nn.Module) -> list[nn.Parameter]:
        """All but the position bias, which the first layer of a stack holds for the others."""
        return [p for n, p in layer.named_parameters() if "relative_attention_bias" not in n]

    def named_inputs(self, inputs: tuple[Tensor, ...], config: Any = None) -> dict[str, Tensor]:
        return dict(zip(("input_ids", "decoder_input_ids"), inputs))

    def pieces(self, config: Any) -> list[Piece]:
        shared = "shared.weight"  # tied with both embeddings, always
        encoder = [
            Piece((f"encoder.block.{i}",), _encoder_layer, layer=i)
            for i in range(config.num_layers)
        ]
        decoder = [
            Piece((f"decoder.block.{i}",), _decoder_layer, layer=config.num_layers + i)
            for i in range(config.num_decoder_layers)
        ]
        scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        return [
            Piece(
                ("encoder.embed_tokens", "encoder.dropout"),
                _embed_source,
                tied=tied_to(shared, "encoder.embed_tokens.weight"),
            ),
            *encoder,
            Piece(
                (
                    "encoder.final_layer_norm",
                    "encoder.dropout",
                    "decoder.embed_tokens",
                    "decoder.dropout",
                ),
                _embed_target,
                tied=tied_to(shared, "decoder.embed_tokens.weight"),
            ),
            *decoder,
            Piece(
                ("decoder.final_layer_norm", "decoder.dropout", "lm_head"),
                partial(_head, scale),
                tied=tied_to(None if _has_own_head(config) else shared, _HEAD),
            ),
        ]

    def resized(self, config: Any, size: SubnetworkSize) -> dict[str, Any]:
        num_encoder = sum(i < config.num_layers for i in size.layers)
        last = config.num_layers + config.num_decoder_layers - 1
        if not 0 < num_encoder < len(size.layers):
            raise UserError(
                f"keep at least one layer of the encoder (0-{config.num_layers - 1}) and one of "
                f"the decoder ({config.num_layers}-{last})."
            )
        return {
            "num_layers": num_encoder,
            "num_decoder_layers": len(size.layers) - num_encoder,
            "num_heads": size.heads,
            "d_ff": size.columns,
        }

    def carried_over(self, layers: list[nn.Module], plan: Plan) -> dict[str, Tensor]:
        """The position bias of either stack, which its first layer holds for all."""
        found = {}
        for stack, is_decoder in (("encoder", False), ("decoder", True)):
            own = [i for i, layer in enumerate(layers) if layer.is_decoder == is_decoder]
            kept = [plan.layers[i].parts[0].units for i in own if plan.layers[i] is not None]
            if any(not np.array_equal(units, kept[0]) for units in kept):
                raise UserError(
                    f"model_type 't5': the layers of the {stack} keep different heads, but share "
                    f"one position bias; choose the same --heads for all."
                )
            bias = layers[own[0]].layer[0].SelfAttention.relative_attention_bias.weight
            if kept[0] is not None:
                bias = bias[:, torch.from_numpy(kept[0])]
            name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            found[name] = bias
        return found


def _has_own_head(config: Any) -> bool:
    return not config.scale_decoder_outputs


def _attention_slot(part: nn.Module, attention: nn.Module, skippable: type[Skippable]) -> Slot:
    size = attention.key_value_proj_dim
    return Slot(
        rows=((attention.q, size),),
        group_rows=((attention.k, size), (attention.v, size)),
        columns=((attention.o, size),),
        informed=((attention, BiasOfKeptHeads),),
        skippable=((part, skippable),),
    )


# What passes between pieces: (states, target ids[, bias]) in the encoder, (states, encoder's
# states[, bias]) in the decoder. Neither stack needs a mask: the encoder sees everything, the
# decoder is causal by its modules' own flag, as in the whole model without padding.


def _embed_source(embedding, dropout, ids: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    source_BS, target_BT = ids
    return dropout(embedding(source_BS)), target_BT


def _encoder_layer(layer: nn.Module, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    states_BSH, target_BT, *bias = x
    states_BSH, bias, _ = layer(states_BSH, None, bias[0] if bias else None)
    return states_BSH, target_BT, bias.contiguous()  # it may have to be sent


def _embed_target(norm, dropout, embedding, drop, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    states_BSH, target_BT, *bias = x
    states_BSH = Spent.apply(states_BSH, *bias)
    return drop(embedding(target_BT)), dropout(norm(states_BSH))


def _decoder_layer(layer: nn.Module, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    states_BTH, encoded_BSH, *bias = x
    states_BTH, bias, _ = layer(states_BTH, None, bias[0] if bias else None, encoded_BSH)
    return states_BTH, encoded_BSH, bias.contiguous()


def _head(scale: float, norm, dropout, head, x: tuple[Tensor, ...]) -> Tensor:
    return head(dropout(norm(Spent.apply(*x))) * scale)


class Spent(Function):
    """Its first argument; the others, used up, get a zero gradient rather than none.

    A pipeline sends a gradient back for every tensor that it sent forward, also where all layers
    of a stage that would have used it are skipped.
    """

    @staticmethod
    def forward(ctx, states: Tensor, *spent: Tensor) -> Tensor:
        ctx.save_for_backward(*spent)
        return states.view_as(states)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)
