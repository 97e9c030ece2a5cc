"""The fields of a `model` section that are understood without the library. No torch.

`FIELDS` are those that a plan's figures depend on, with values that all models of their type can
have, and the library's defaults; `IDLE` those on which neither shape nor counts depend, with values
that published models have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Kind = Callable[[Any], bool]

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _count_or_none(value: Any) -> bool:
    return value is None or _count(value)


def _flag(value: Any) -> bool:
    return type(value) is bool


def _chance(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def small(value: Any) -> bool:
    return type(value) is float and 0 < value <= 1


def _one_of(*known: Any) -> Kind:
    return lambda value: value in known


# Kind and the library's default of every field.
_LLAMA: dict[str, tuple[Kind, Any]] = {
    "vocab_size": (_count, 32000),
    "hidden_size": (_count, 4096),
    "intermediate_size": (_count, 11008),
    "num_hidden_layers": (_count, 32),
    "num_attention_heads": (_count, 32),
    "num_key_value_heads": (_count_or_none, None),
    "hidden_act": (_one_of(*ACTIVATIONS), "silu"),
    "max_position_embeddings": (_count, 2048),
    "initializer_range": (small, 0.02),
    "rms_norm_eps": (small, 1e-6),
    "tie_word_embeddings": (_flag, False),
    "attention_dropout": (_chance, 0.0),
}
_QWEN = {
    **_LLAMA,
    "vocab_size": (_count, 151936),
    "intermediate_size": (_count, 22016),
    "num_key_value_heads": (_count_or_none, 32),
    "max_position_embeddings": (_count, 32768),
}
FIELDS: dict[str, dict[str, tuple[Kind, Any]]] = {
    "llama": {
        **_LLAMA,
        "attention_bias": (_flag, False),
        "mlp_bias": (_flag, False),
        "head_dim": (_count_or_none, None),
    },
    "mistral": {
        **_LLAMA,
        "intermediate_size": (_count, 14336),
        "num_key_value_heads": (_count_or_none, 8),
        "max_position_embeddings": (_count, 4096 * 32),
        "sliding_window": (_count_or_none, 4096),
        "head_dim": (_count_or_none, None),
    },
    "qwen2": {**_QWEN, "head_dim": (_count_or_none, None)},
    "qwen3": {**_QWEN, "attention_bias": (_flag, False), "head_dim": (_count, 128)},
    "gpt2": {
        "vocab_size": (_count, 50257),
        "n_positions": (_count, 1024),
        "n_embd": (_count, 768),
        "n_layer": (_count, 12),
        "n_head": (_count, 12),
        "n_inner": (_count_or_none, None),
        "activation_function": (_one_of(*ACTIVATIONS), "gelu_new"),
        "resid_pdrop": (_chance, 0.1),
        "embd_pdrop": (_chance, 0.1),
        "attn_pdrop": (_chance, 0.1),
        "layer_norm_epsilon": (small, 1e-5),
        "initializer_range": (small, 0.02),
        "tie_word_embeddings": (_flag, True),
        "add_cross_attention": (_one_of(False), False),
    },
    "bert": {
        "vocab_size": (_count, 30522),
        "hidden_size": (_count, 768),
        "num_hidden_layers": (_count, 12),
        "num_attention_heads": (_count, 12),
        "intermediate_size": (_count, 3072),
        "hidden_act": (_one_of(*ACTIVATIONS), "gelu"),
        "hidden_dropout_prob": (_chance, 0.1),
        "attention_probs_dropout_prob": (_chance, 0.1),
        "max_position_embeddings": (_count, 512),
        "type_vocab_size": (_count, 2),
        "initializer_range": (small, 0.02),
        "layer_norm_eps": (small, 1e-12),
        "tie_word_embeddings": (_flag, True),
        "is_decoder": (_one_of(False), False),
    },
    "t5": {
        "vocab_size": (_count, 32128),
        "d_model": (_count, 512),
        "d_kv": (_count, 64),
        "d_ff": (_count, 2048),
        "num_layers": (_count, 6),
        "num_decoder_layers": (_count_or_none, None),
        "num_heads": (_count, 8),
        "relative_attention_num_buckets": (_count, 32),
        "relative_attention_max_distance": (_count, 128),
        "dropout_rate": (_chance, 0.1),
        "layer_norm_epsilon": (small, 1e-6),
        "feed_forward_proj": (_one_of("relu", "gated-gelu"), "relu"),
        "tie_word_embeddings": (_flag, True),
        "pad_token_id": (_one_of(0), 0),
    },
    "mamba": {
        "vocab_size": (_count, 50280),
        "hidden_size": (_count, 768),
        "state_size": (_count, 16),
        "num_hidden_layers": (_count, 32),
        "layer_norm_epsilon": (small, 1e-5),
        "expand": (_count, 2),
        "conv_kernel": (_count, 4),
        "use_bias": (_flag, False),
        "use_conv_bias": (_flag, True),
        "hidden_act": (_one_of("silu"), "silu"),
        "initializer_range": (small, 0.1),
        "residual_in_fp32": (_flag, True),
        "time_step_rank": (lambda value: value == "auto" or _count(value), "auto"),
        "time_step_min": (small, 0.001),
        "time_step_max": (small, 0.1),
        "time_step_floor": (small, 1e-4),
        "rescale_prenorm_residual": (_flag, False),
        "tie_word_embeddings": (_flag, True),
    },
    "mamba2": {
        "num_heads": (_count, 128),
        "head_dim": (_count, 64),
        "vocab_size": (_count, 32768),
        "hidden_size": (_count, 4096),
        "state_size": (_count, 128),
        "num_hidden_layers": (_count, 64),
        "layer_norm_epsilon": (small, 1e-5),
        "expand": (_count, 2),
        "conv_kernel": (_count, 4),
        "n_groups": (_count, 8),
        "use_bias": (_flag, False),
        "use_conv_bias": (_flag, True),
        "hidden_act": (_one_of("silu"), "silu"),
        "initializer_range": (small, 0.1),
        "residual_in_fp32": (_flag, True),
        "time_step_min": (small, 0.001),
        "time_step_max": (small, 0.1),
        "time_step_floor": (small, 1e-4),
        "rescale_prenorm_residual": (_flag, False),
        "chunk_size": (_count, 256),
        "tie_word_embeddings": (_flag, False),
    },
}


def _tokens(value: Any) -> bool:
    tokens = value if type(value) is list else [value]
    return all(token is None or (type(token) is int and token >= 0) for token in tokens)


def _rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _no_scaling_or_llama3(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    numbers = {key: x for key, x in value.items() if key != "rope_type"}
    names = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    if value.get("rope_type") != "llama3" or set(numbers) != names:
        return False
    return _count(numbers.pop("original_max_position_embeddings")) and all(
        type(x) is float and _rate(x) for x in numbers.values()
    )


# Fields of published models on which neither shape nor counts depend, with values that train.
_TOKENS: dict[str, Kind] = {f"{name}_token_id": _tokens for name in ("bos", "eos", "pad")}
_ROPE: dict[str, Kind] = {"rope_theta": _rate, "rope_scaling": _one_of(None)}
_NO_WINDOW: dict[str, Kind] = {
    **_TOKENS,
    **_ROPE,
    "max_window_layers": _count,
    "sliding_window": _count_or_none,  # without effect, see `known_models`
    "use_mrope": lambda value: value is False,
    "use_sliding_window": lambda value: value is False,
}
IDLE: dict[str, dict[str, Kind]] = {
    "llama": {
        **_TOKENS,
        **_ROPE,
        "rope_scaling": _no_scaling_or_llama3,
        "pretraining_tp": _one_of(1),
    },
    "mistral": {**_TOKENS, **_ROPE},
    "qwen2": _NO_WINDOW,
    "qwen3": _NO_WINDOW,
    "gpt2": {
        **_TOKENS,
        "summary_activation": _one_of(None),
        "summary_first_dropout": _one_of(0.1),
        "summary_proj_to_labels": lambda value: value is True,
        "summary_type": _one_of("cls_index"),
        "summary_use_proj": lambda value: value is True,
    },
    "bert": {**_TOKENS, "position_embedding_type": _one_of("absolute")},
    "t5": {
        "eos_token_id": _tokens,
        "decoder_start_token_id": _one_of(0),
        "initializer_factor": _one_of(1.0),
        "is_encoder_decoder": lambda value: value is True,
    },
    "mamba": _TOKENS,
    "mamba2": _TOKENS,
}
