"""What the `model` section may say, beside the names that Hugging Face knows.

Every field of a Hugging Face config is either honoured, or without effect on training and carried
into the export, or refused here: what would change training unsaid, or stand there for nothing.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import Field

from est_ds.config.strict import Strict, checked
from est_ds.errors import UserError

# Fields that est_ds decides, and how.
DECIDED = {
    "dtype": "precision says it",
    "torch_dtype": "precision says it",
    "attn_implementation": "it is sdpa, where there is attention",
    "_attn_implementation": "it is sdpa, where there is attention",
}
# Fields with one value that training can honour. Those of older configs, which the library no
# longer knows, are left out of the config then.
ONE_VALUE = {
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "chunk_size_feed_forward": 0,
    "problem_type": None,
    "pretraining_tp": 1,
    "reorder_and_upcast_attn": False,
    "rope_interleaved": False,
    "use_mrope": False,
    "position_embedding_type": "absolute",
}
# Of `rope_parameters`, by their `rope_type`; the library passes over others with a warning.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
}


class Init(Strict):
    """`model.init`: how wide the first weights are drawn, where Hugging Face's widths will not do.

    Attributes:
        std: standard deviation of embeddings and linear layers: Hugging Face's `initializer_range`
            by another name. With `residual: tinyllama` it is sqrt(2 / (5 d)) unless one of the two
            is given.
        residual: that of the projections that write into the residual stream (o_proj and down_proj
            of a Llama), of L layers of width d. `none`: std like all others. `gpt2`: std /
            sqrt(2 L), as Hugging Face draws those of GPT-2 alone. `tinyllama`: 1 / sqrt(d) / L
            (jzhang38/TinyLlama, lit_gpt/model.py). Not set: as Hugging Face has it.
    """

    std: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    residual: Literal["none", "gpt2", "tinyllama"] | None = None

    def residual_std(self, config: Any) -> float | None:
        """The width of the projections into the residual stream; None: Hugging Face's.

        Args:
            config: Hugging Face config of the full model.
        """
        if self.residual is None:  # T5 has no width to name either
            return None
        num_layers = config.num_hidden_layers
        return {
            "none": config.initializer_range,
            "gpt2": config.initializer_range / math.sqrt(2 * num_layers),
            "tinyllama": 1 / math.sqrt(config.hidden_size) / num_layers,
        }[self.residual]


def init_of(section: dict[str, Any], plain: dict[str, Any]) -> Init:
    """What a `model` section says of the first weights.

    Args:
        plain: fields of the family's default config.

    Raises:
        UserError: it says nothing, twice the same, or what the family cannot honour.
    """
    if "init" not in section:
        return Init()
    init, model_type = section["init"], section["model_type"]
    if not isinstance(init, dict):
        raise UserError(f"model.init={init!r}: write {{std: NUMBER, residual: RULE}}.")
    init = checked(Init, init, "model.init")
    if init == Init():
        raise UserError("model.init sets nothing; give it std or residual, or remove it.")
    if "initializer_range" not in plain:
        raise UserError(
            f"model.init does not work with model_type {model_type!r}, which draws every matrix by "
            f"a width of its own; set model.initializer_factor."
        )
    if init.std is not None and "initializer_range" in section:
        raise UserError(
            f"model.init.std={init.std} and model.initializer_range="
            f"{section['initializer_range']} are the same; remove one of them."
        )
    return init


def set_width(config: Any, section: dict[str, Any], init: Init) -> None:
    """Writes the width of embeddings and linear layers into a Hugging Face config."""
    if init.std is not None:
        config.initializer_range = init.std
    elif init.residual == "tinyllama" and "initializer_range" not in section:
        config.initializer_range = math.sqrt(2 / (5 * config.hidden_size))


def todays_section(section: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The section in the words of today's Hugging Face, with numbers of the types that it wants.

    Args:
        plain: fields of the family's default config.

    Raises:
        UserError: it holds what training cannot honour, or contradicts itself.
    """
    section = _plain_floats(section)  # copied: the library writes into mappings that it is given
    for key, value in section.items():
        if key in DECIDED:
            raise UserError(f"model.{key} is set by est_ds ({DECIDED[key]}); remove it.")
        if key in ONE_VALUE and value != ONE_VALUE[key]:
            raise UserError(
                f"model.{key}={value!r} is not supported; remove it, or set "
                f"{json.dumps(ONE_VALUE[key])}."
            )
        if key in ("is_decoder", "is_encoder_decoder") and value != plain.get(key, False):
            raise UserError(f"model.{key}={value} is not supported here; remove it.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"model.{key}={value}: input should be a finite number.")
        if isinstance(plain.get(key), float) and type(value) is int:
            section[key] = float(value)
    _check_ids(section, plain)
    if "rope_parameters" in plain:
        _todays_rope(section)
    older = [key for key in ONE_VALUE if key in section and key not in plain]
    return {key: value for key, value in section.items() if key not in older}


def _plain_floats(value: Any) -> Any:
    """A copy with the numbers that JSON has not, where the library wrote them into a config.json as
    `{"__float__": "Infinity"}`."""
    if isinstance(value, list):
        return [_plain_floats(part) for part in value]
    if not isinstance(value, dict):
        return value
    if list(value) == ["__float__"] and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {key: _plain_floats(part) for key, part in value.items()}


def _check_ids(section: dict[str, Any], plain: dict[str, Any]) -> None:
    vocabulary = section.get("vocab_size", plain["vocab_size"])
    for key, value in section.items():
        # The family's own is there whether the section says it or not.
        if not key.endswith("_token_id") or value in (None, plain.get(key)):
            continue
        for token in value if isinstance(value, list) else [value]:
            if type(token) is not int or not isinstance(vocabulary, int):
                continue  # the library says what is wrong with it
            if not 0 <= token < vocabulary:
                raise UserError(
                    f"model.{key}={value} is outside the vocabulary (model.vocab_size="
                    f"{vocabulary}); use 0 to {vocabulary - 1}, or null for none."
                )


def _todays_rope(section: dict[str, Any]) -> None:
    """Takes `rope_theta` and `rope_scaling`, which `rope_parameters` holds today.

    Raises:
        UserError: they differ from it, or it has a key that its kind of scaling passes over.
    """
    scaling, theta = section.pop("rope_scaling", None) or {}, section.pop("rope_theta", None)
    if not isinstance(scaling, dict):
        raise UserError(f"model.rope_scaling={scaling!r}: write a mapping, or leave it out.")
    older = dict(scaling)
    if "type" in older:
        older.setdefault("rope_type", older.pop("type"))
    if theta is not None:
        older["rope_theta"] = theta
    rope = section.get("rope_parameters")
    if rope is None:
        rope = older
    if not isinstance(rope, dict):
        return  # the library says what is wrong with it
    for key, value in older.items():
        if rope.setdefault(key, value) != value:
            raise UserError(
                f"model.{key if key == 'rope_theta' else 'rope_scaling.' + key}={value!r} differs "
                f"from model.rope_parameters.{key}={rope[key]!r}, the newer name of the same "
                f"field; keep one of them."
            )
    if not rope:
        section.pop("rope_parameters", None)
        return
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KEYS:
        raise UserError(
            f"model.rope_parameters.rope_type={kind!r} is not known; use {', '.join(ROPE_KEYS)}."
        )
    known = ("rope_type", "type", "rope_theta", *ROPE_KEYS[kind])
    for key in rope:
        if key not in known:
            raise UserError(
                f"model.rope_parameters.{key} has no effect with rope_type={kind!r}; known are "
                f"{', '.join(known)}."
            )
    section["rope_parameters"] = rope


def refuse_overruled(section: dict[str, Any], config: Any) -> None:
    """Refuses fields to which the library gave another value than the section.

    Raises:
        UserError: there is one, as Qwen's `sliding_window` without `use_sliding_window`.
    """
    openly = {"rope_parameters", "tie_word_embeddings"}  # filled in; the family's own business
    if section.get("use_sliding_window") is False:
        openly.add("sliding_window")
    for key, value in section.items():
        if value is not None and key not in openly and getattr(config, key) != value:
            raise UserError(
                f"model.{key}={value!r} cannot take effect: other fields of the section make "
                f"Hugging Face set it to {getattr(config, key)!r}; remove it, or change those."
            )


def dropout_of(config: Any) -> dict[str, float]:
    """The fields of a Hugging Face config that drop something in training, with their chances.

    Raises:
        UserError: a chance is none, or 1.
    """
    found = {}
    for field, value in config.to_dict().items():
        if "drop" not in field or field.startswith(("summary", "classifier")) or not value:
            continue
        if not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise UserError(
                f"model.{field}={value!r}: input should be a chance of dropout, at least 0.0 and "
                f"less than 1."
            )
        found[field] = value
    return found
