"""The supported families. A new one is one file and one line here."""

from __future__ import annotations

from typing import Any

from est_ds.config.published import FROM, SHA256
from est_ds.errors import UserError, did_you_mean
from est_ds.plans.shape import Attention
from est_ds.slicing.families.base import Family
from est_ds.slicing.families.bert import Bert
from est_ds.slicing.families.fields import (
    init_of,
    refuse_overruled,
    set_width,
    todays_section,
)
from est_ds.slicing.families.gpt2 import Gpt2
from est_ds.slicing.families.llama import Llama
from est_ds.slicing.families.mamba import Mamba
from est_ds.slicing.families.t5 import T5

FAMILIES: tuple[Family, ...] = (Llama(), Gpt2(), Bert(), T5(), Mamba())


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`.

    Raises:
        UserError: no family file speaks for it.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(t for family in FAMILIES for t in family.model_types)
    raise UserError(
        f"model.model_type={model_type!r} is not supported; supported are {known}. A family file "
        f"(est_ds/slicing/families/) must say the model's shape, where its layers are, which "
        f"linear layers hold heads and MLP columns, and what follows their count."
    )


def hf_config(section: dict[str, Any], sequence: int | None = None) -> Any:
    """The Hugging Face config of the run file's `model` section.

    Args:
        sequence: the run's sequence length, which the model must be able to take.

    Raises:
        UserError: an unknown family or key, or values that Hugging Face or the run refuses.
    """
    from transformers import AutoConfig

    model_type = section.get("model_type")
    family = family_of(model_type)
    plain = AutoConfig.for_model(model_type)
    fields = plain.to_dict()
    known = set(fields) | set(plain.attribute_map) | family.extra_keys
    init = init_of(section, fields)
    section = todays_section(section, fields)
    del section["model_type"]
    for key in ("init", FROM, SHA256):
        section.pop(key, None)
    for key in section:
        if key not in known:
            hint = (
                did_you_mean(key, known | {"init", FROM}).strip() or "see the class's documentation"
            )
            raise UserError(f"unknown key 'model.{key}' for model_type {model_type!r}; {hint}")
    family.check_section(section)
    try:
        config = AutoConfig.for_model(model_type, **section)
        config._attn_implementation = family.attention
        refuse_overruled(section, config)
        set_width(config, section, init)
        shape = family.shape(config)
    except UserError:
        raise
    except Exception as e:  # whatever the library raises for values that do not fit
        raise UserError(f"model: {' '.join(str(e).split())}; correct the section.") from None
    _check_divides(shape, config)
    if sequence is not None and shape.sequence is not None and sequence > shape.sequence:
        raise UserError(
            f"data.sequence={sequence} is longer than the model's longest sequence "
            f"(model.max_position_embeddings={shape.sequence}); shorten it, or raise the model's."
        )
    return config


def _check_divides(shape: Any, config: Any) -> None:
    if not shape.layers or shape.hidden < 1:
        raise UserError(
            f"model: {shape.num_layers} layers of width {shape.hidden}; a model needs at least 1."
        )
    if shape.vocabulary < 1:
        raise UserError(f"model: a vocabulary of {shape.vocabulary}; use at least 1.")
    attention = shape.layers[0][0]
    if not isinstance(attention, Attention):
        return  # the family has checked its own
    if min(attention.heads, attention.key_value_groups, attention.head_dim) < 1:
        raise UserError(
            f"model: {attention.heads} heads of width {attention.head_dim} and "
            f"{attention.key_value_groups} key/value heads; use at least 1 of each."
        )
    if attention.heads % attention.key_value_groups:
        raise UserError(
            f"model.num_key_value_heads={attention.key_value_groups} does not divide "
            f"model.num_attention_heads={attention.heads}; use a divisor."
        )
