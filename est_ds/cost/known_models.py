"""The `model` section of a run file understood without its library: seconds earlier. No torch.

It is understood where every field and its value is in `known_fields`. Everything else (published
weights, other fields, values that may be wrong) is not, and is the library's to understand or to
refuse. A test compares shapes, parameters, defaults and dropout with the library's.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from est_ds.cost.known_fields import FIELDS, IDLE, small
from est_ds.cost.parameters import PieceSize
from est_ds.plans.shape import ModelShape
from est_ds.plans.shapes import bert_shape, gpt2_shape, llama_shape, mamba_shape, t5_shape

Fields = SimpleNamespace


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs of a model.

    Attributes:
        pieces: parameters of the pieces that a pipe stage may own, in the family's order.
        dropout: the fields that drop something in training, with their chances.
        head: the library's class that builds the model.
        separable: whether documents of one sequence can be kept apart.
        decoder_start: first input of an encoder-decoder's decoder; None of any other model.
    """

    shape: ModelShape
    pieces: tuple[PieceSize, ...]
    dropout: dict[str, float]
    head: str = "AutoModelForCausalLM"
    separable: bool = True
    decoder_start: int | None = None


def known_model(section: dict[str, Any], sequence: int) -> ModelFacts | None:
    """The model of a run file's `model` section; None where that is the library's to say.

    Args:
        sequence: the run's sequence length.
    """
    fields = _fields(section)
    if fields is None:
        return None
    found = _MODELS[fields.model_type](fields)
    bound = found.shape.sequence if found else None
    return None if bound is not None and sequence > bound else found


def _fields(section: dict[str, Any]) -> Fields | None:
    """The fields of a section and the defaults of the others; None where one is not known."""
    model_type = section.get("model_type")
    if model_type not in FIELDS:
        return None
    known, idle = FIELDS[model_type], IDLE[model_type]
    kinds = idle | {key: kind for key, (kind, _) in known.items()}
    given = {key: value for key, value in section.items() if key not in ("model_type", "init")}
    if any(key not in kinds or not kinds[key](value) for key, value in given.items()):
        return None
    if "sliding_window" in idle and given.get("sliding_window"):
        if "use_sliding_window" not in given:  # the library refuses it
            return None
    if "init" in section and not _plain_init(section, known):
        return None
    defaults = {key: default for key, (_, default) in known.items()}
    shaping = {key: value for key, value in given.items() if key in known}
    fields = Fields(model_type=model_type, **(defaults | shaping))
    return fields if _in_vocabulary(given, fields.vocab_size) else None


def _in_vocabulary(given: dict[str, Any], vocabulary: int) -> bool:
    """Whether the special tokens that a section names are some of its vocabulary."""
    ids = (value for key, value in given.items() if key.endswith("_token_id"))
    tokens = (token for x in ids for token in (x if isinstance(x, list) else [x]))
    return all(token is None or token < vocabulary for token in tokens)


def _plain_init(section: dict[str, Any], known: dict[str, Any]) -> bool:
    init = section["init"]
    if not isinstance(init, dict) or len(init) != 1 or "initializer_range" not in known:
        return False
    [(key, value)] = init.items()
    if key == "std":
        return small(value) and "initializer_range" not in section
    return key == "residual" and value in ("none", "gpt2", "tinyllama")


def _dropout(fields: Fields) -> dict[str, float]:
    return {k: v for k, v in vars(fields).items() if "drop" in k and v}


def _ends(
    fields: Fields, layers: list[int], words: int, before: int, behind: int
) -> tuple[PieceSize, ...]:
    """Pieces of a model whose head has weights for all words, its own or the embedding's.

    Args:
        layers: parameters of every layer.
        words: of the embedding.
        before: other parameters in front of the layers.
        behind: other parameters behind them.
    """
    tied = fields.tie_word_embeddings
    shared = {"words": words} if tied else {}
    head = 0 if tied else words
    return (
        PieceSize(None, before + head, shared),
        *(PieceSize(i, count) for i, count in enumerate(layers)),
        PieceSize(None, behind + head, shared),
    )


def _llama(fields: Fields) -> ModelFacts | None:
    heads, hidden, columns = (
        fields.num_attention_heads,
        fields.hidden_size,
        fields.intermediate_size,
    )
    groups = fields.num_key_value_heads or heads
    head_dim = getattr(fields, "head_dim", None) or hidden // heads
    if hidden % heads or heads % groups or head_dim % 2:
        return None
    fields.num_key_value_heads = groups
    biases = getattr(fields, "attention_bias", False)
    rows = head_dim * (heads + 2 * groups)
    layer = hidden * (rows + head_dim * heads) + 3 * hidden * columns + 2 * hidden
    if biases or fields.model_type == "qwen2":
        layer += rows
    layer += hidden * biases
    if fields.model_type == "qwen3":
        layer += 2 * head_dim
    if getattr(fields, "mlp_bias", False):
        layer += 2 * columns + hidden
    layers = [layer] * fields.num_hidden_layers
    pieces = _ends(fields, layers, fields.vocab_size * hidden, 0, hidden)
    return ModelFacts(llama_shape(fields), pieces, _dropout(fields))


def _gpt2(fields: Fields) -> ModelFacts | None:
    hidden = fields.n_embd
    if hidden % fields.n_head:
        return None
    columns = fields.n_inner or 4 * hidden
    attention = 4 * hidden * hidden + 4 * hidden
    layer = attention + 2 * hidden * columns + columns + hidden + 4 * hidden
    words, places = fields.vocab_size * hidden, fields.n_positions * hidden
    pieces = _ends(fields, [layer] * fields.n_layer, words, places, 2 * hidden)
    return ModelFacts(gpt2_shape(fields), pieces, _dropout(fields))


def _bert(fields: Fields) -> ModelFacts | None:
    hidden, columns = fields.hidden_size, fields.intermediate_size
    if hidden % fields.num_attention_heads:
        return None
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * columns + columns + hidden + 4 * hidden
    places = (fields.max_position_embeddings + fields.type_vocab_size + 2) * hidden
    biases = fields.vocab_size * (1 if fields.tie_word_embeddings else 2)  # of the head, twice
    transform = hidden * hidden + 3 * hidden + biases
    words, layers = fields.vocab_size * hidden, [layer] * fields.num_hidden_layers
    pieces = _ends(fields, layers, words, places, transform)
    return ModelFacts(bert_shape(fields), pieces, _dropout(fields), head="AutoModelForMaskedLM")


def _t5(fields: Fields) -> ModelFacts | None:
    hidden, heads = fields.d_model, fields.num_heads
    fields.is_gated_act = fields.feed_forward_proj.startswith("gated-")
    fields.num_decoder_layers = fields.num_decoder_layers or fields.num_layers
    words = {"words": fields.vocab_size * hidden}
    attention = 4 * hidden * heads * fields.d_kv + hidden
    mlp = (3 if fields.is_gated_act else 2) * hidden * fields.d_ff + hidden
    bias = fields.relative_attention_num_buckets * heads  # of the first layer of a stack
    tied = fields.tie_word_embeddings
    encoder = [PieceSize(i, attention + mlp + bias * (i == 0)) for i in range(fields.num_layers)]
    decoder = [
        PieceSize(fields.num_layers + i, 2 * attention + mlp + bias * (i == 0))
        for i in range(fields.num_decoder_layers)
    ]
    pieces = (
        PieceSize(None, 0, words),
        *encoder,
        PieceSize(None, hidden, words),
        *decoder,
        PieceSize(None, hidden + (0 if tied else words["words"]), words if tied else {}),
    )
    return ModelFacts(
        t5_shape(fields),
        pieces,
        _dropout(fields),
        head="AutoModelForSeq2SeqLM",
        separable=False,
        decoder_start=fields.pad_token_id,
    )


def _mamba(fields: Fields) -> ModelFacts | None:
    hidden, state = fields.hidden_size, fields.state_size
    inner = fields.expand * hidden
    if fields.time_step_rank == "auto":
        fields.time_step_rank = math.ceil(hidden / 16)
    fields.intermediate_size = inner
    rank = fields.time_step_rank
    layer = hidden * 3 * inner + fields.use_bias * (2 * inner + hidden)
    layer += inner * (fields.conv_kernel + fields.use_conv_bias)
    layer += inner * (rank + 2 * state) + (rank + 1) * inner
    layer += inner * state + inner + hidden
    return _state_space(fields, layer)


def _mamba2(fields: Fields) -> ModelFacts | None:
    hidden, heads = fields.hidden_size, fields.num_heads
    inner = heads * fields.head_dim
    if fields.expand * hidden != inner or heads % fields.n_groups:
        return None
    convolved = inner + 2 * fields.n_groups * fields.state_size
    rows = inner + convolved + heads
    layer = hidden * rows + inner * hidden + fields.use_bias * (rows + hidden)
    layer += convolved * (fields.conv_kernel + fields.use_conv_bias)
    layer += 3 * heads + inner + hidden
    return _state_space(fields, layer)


def _state_space(fields: Fields, layer: int) -> ModelFacts | None:
    if importlib.util.find_spec("mamba_ssm"):  # the family refuses
        return None
    hidden = fields.hidden_size
    layers = [layer] * fields.num_hidden_layers
    pieces = _ends(fields, layers, fields.vocab_size * hidden, 0, hidden)
    return ModelFacts(mamba_shape(fields), pieces, _dropout(fields), separable=False)


_MODELS: dict[str, Callable[[Fields], ModelFacts | None]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
    "mamba": _mamba,
    "mamba2": _mamba2,
}
