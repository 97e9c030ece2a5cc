"""BERT with its masked-language-model head: attention both ways, norms after the residuals."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from est_ds.plans.shape import ModelShape
from est_ds.plans.shapes import bert_shape
from est_ds.slicing.families.base import (
    Family,
    Passed,
    Piece,
    Slot,
    SubnetworkSize,
    attends_by_document,
    document_numbers,
    passed,
    shared_mask,
    taken,
    tied_to,
)
from est_ds.slicing.leaf import Skippable, SkippableLayer


class SkippableSelfAttention(Skippable):
    """Attention, residual and norm, and the weights."""

    def est_skip(self, hidden_states: Tensor, *args, **kwargs):
        return hidden_states, None


class SkippableIntermediate(SkippableLayer):
    """The first half of the MLP, whose result a skipped second half does not use."""

    def est_mask_out(self, computed: Tensor, instead: Tensor):
        return computed


class SkippableOutput(Skippable):
    """The second half of the MLP, with residual and norm; its second argument is the stream."""

    def est_skip(self, hidden_states: Tensor, input_tensor: Tensor):
        return input_tensor


class Bert(Family):
    model_types = ("bert",)
    auto_class = "AutoModelForMaskedLM"
    head_size_from = "hidden_size / num_attention_heads"

    def shape(self, config: Any) -> ModelShape:
        return bert_shape(config)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.bert.encoder.layer)

    def slots(self, layer: nn.Module) -> tuple[Slot, ...]:
        heads, out = layer.attention.self, layer.attention.output.dense
        size = heads.attention_head_size
        return (
            Slot(
                rows=((heads.query, size),),
                group_rows=((heads.key, size), (heads.value, size)),
                columns=((out, size),),
                skippable=((layer.attention, SkippableSelfAttention),),
            ),
            Slot(
                rows=((layer.intermediate.dense, 1),),
                columns=((layer.output.dense, 1),),
                skippable=(
                    (layer.intermediate, SkippableIntermediate),
                    (layer.output, SkippableOutput),
                ),
            ),
        )

    def attentions(self, layer: nn.Module) -> tuple[nn.Module, ...]:
        return (layer.attention.self,)

    def named_inputs(self, inputs: tuple[Tensor, ...], config: Any = None) -> dict[str, Tensor]:
        named = super().named_inputs(inputs, config)
        if len(inputs) > 1:  # unlike causal models, the library makes no mask from positions
            named["attention_mask"] = _own_document(inputs[1], config)
        return named

    def pieces(self, config: Any) -> list[Piece]:
        layers = [
            Piece((f"bert.encoder.layer.{i}",), _layer, layer=i)
            for i in range(config.num_hidden_layers)
        ]
        words, head = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
        source = words if config.tie_word_embeddings else None
        return [
            Piece(("bert.embeddings",), _embed, tied=tied_to(source, words)),
            *layers,
            Piece(("cls",), _head, tied=tied_to(source, head)),
        ]

    def resized(self, config: Any, size: SubnetworkSize) -> dict[str, Any]:
        return {"num_hidden_layers": len(size.layers), "intermediate_size": size.columns}


def _embed(embeddings: nn.Module, x: Passed) -> Passed:
    ids_BT, positions_BT = taken(x)
    return passed(embeddings(input_ids=ids_BT, position_ids=positions_BT), positions_BT)


def _layer(layer: nn.Module, x: Passed) -> Passed:
    x_BTH, positions_BT = taken(x)
    # Without a mask every position sees every other, as in the whole model without padding.
    config = layer.attention.self.config
    mask = None if positions_BT is None else _own_document(positions_BT, config)
    return passed(layer(x_BTH, attention_mask=mask), positions_BT)


def _head(head: nn.Module, x: Passed) -> Tensor:
    return head(taken(x)[0])


def _own_document(positions_BT: Tensor, config: Any) -> Tensor:
    """Which positions see which, bool [B, 1, T, T]: those of the same document; or their numbers,
    where attention is computed document by document."""
    if config is not None and attends_by_document(config):
        return document_numbers(positions_BT)

    def make() -> Tensor:
        document_BT = (positions_BT == 0).cumsum(-1)
        return document_BT[:, None, :, None] == document_BT[:, None, None, :]

    return shared_mask(positions_BT, "both ways", make)
