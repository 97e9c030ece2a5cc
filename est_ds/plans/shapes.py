"""The shapes of the families' models, of the fields of their Hugging Face configs. No torch.

`config` is a Hugging Face config, or anything with the same attributes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from est_ds.errors import UserError
from est_ds.plans.shape import Attention, Mlp, ModelShape, Part, StateSpace


def llama_shape(config: Any) -> ModelShape:
    """Of Llama, Mistral, Qwen2 and Qwen3.

    Raises:
        UserError: a head has an odd width.
    """
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    if head_dim % 2:
        raise UserError(
            f"model: a head has width {head_dim}, and rotary positions need an even width; "
            f"change model.head_dim, or model.hidden_size / model.num_attention_heads."
        )
    attention = Attention(heads, config.num_key_value_heads, head_dim, hidden)
    mlp = Mlp(config.intermediate_size, hidden, matrices=3)
    parts, positions = (attention, mlp), config.max_position_embeddings
    return _alike(config, parts, config.num_hidden_layers, positions)


def gpt2_shape(config: Any) -> ModelShape:
    """Of GPT-2.

    Raises:
        UserError: heads do not divide the width, or there is a cross attention.
    """
    heads, hidden = config.n_head, config.n_embd
    _check_heads(heads, hidden)
    if config.add_cross_attention:
        raise UserError("model.add_cross_attention=True is not supported; set it to false.")
    attention = Attention(heads, heads, hidden // heads, hidden)
    mlp = Mlp(config.n_inner or 4 * hidden, hidden, matrices=2)
    return _alike(config, (attention, mlp), config.n_layer, config.n_positions)


def bert_shape(config: Any) -> ModelShape:
    """Of BERT with its masked-language-model head.

    Raises:
        UserError: heads do not divide the width, or it is to be a decoder.
    """
    heads, hidden = config.num_attention_heads, config.hidden_size
    _check_heads(heads, hidden)
    if config.is_decoder:
        raise UserError("model.is_decoder=True is not supported for bert; set it to false.")
    attention = Attention(heads, heads, hidden // heads, hidden)
    mlp = Mlp(config.intermediate_size, hidden, matrices=2)
    parts, positions = (attention, mlp), config.max_position_embeddings
    shape = _alike(config, parts, config.num_hidden_layers, positions)
    return replace(shape, head_inner=hidden * hidden)


def t5_shape(config: Any) -> ModelShape:
    """Of T5: the encoder's layers, then the decoder's."""
    heads, hidden = config.num_heads, config.d_model
    own = Attention(heads, heads, config.d_kv, hidden)
    cross = Attention(heads, heads, config.d_kv, hidden, cross=True)
    mlp = Mlp(config.d_ff, hidden, matrices=3 if config.is_gated_act else 2)
    encoder = ((own, mlp),) * config.num_layers
    return ModelShape(
        family=config.model_type,
        layers=encoder + ((own, cross, mlp),) * config.num_decoder_layers,
        hidden=hidden,
        vocabulary=config.vocab_size,
        sequence=None,
        encoder_layers=config.num_layers,
    )


def mamba_shape(config: Any) -> ModelShape:
    """Of Mamba, whose columns are inner channels, and of Mamba2, whose columns are heads."""
    hidden, state = config.hidden_size, config.state_size
    if config.model_type == "mamba":
        rank = int(config.time_step_rank)
        mixer = StateSpace(config.intermediate_size, 1, 1, state, hidden, step_rank=rank)
    else:
        mixer = StateSpace(
            config.num_heads,
            config.head_dim,
            config.n_groups,
            state,
            hidden,
            chunk=config.chunk_size,
        )
    return _alike(config, (mixer,), config.num_hidden_layers, None)


def _alike(
    config: Any, parts: tuple[Part, ...], num_layers: int, sequence: int | None
) -> ModelShape:
    """Of a model whose layers all have these parts."""
    return ModelShape(
        family=config.model_type,
        layers=(parts,) * num_layers,
        hidden=parts[0].hidden,
        vocabulary=config.vocab_size,
        sequence=sequence,
    )


def _check_heads(heads: int, hidden: int) -> None:
    if hidden % heads:
        raise UserError(
            f"model.num_attention_heads={heads} does not divide model.hidden_size={hidden}; "
            f"use a divisor."
        )
