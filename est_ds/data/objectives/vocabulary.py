"""Ids beyond the tokenizer's vocabulary, for tokens that no text has: masks, sentinels, modes."""

from __future__ import annotations

from est_ds.data.objectives.base import Surroundings
from est_ds.errors import UserError


def corpus_vocabulary(surroundings: Surroundings, given: int | None) -> int:
    """The tokenizer's vocabulary: as the manifest says, or as `objective.vocabulary` does.

    Raises:
        UserError: neither says it, or both and not the same.
    """
    stated = surroundings.vocabulary
    if stated is None and given is None:
        raise UserError(
            f"the corpus {surroundings.corpus_name} has no manifest that says its tokenizer's "
            f"vocabulary; set objective.vocabulary, or pack the corpus with `python -m data_prep "
            f"pack`."
        )
    if stated is not None and given not in (None, stated):
        raise UserError(
            f"objective.vocabulary={given}, but the corpus {surroundings.corpus_name} was made "
            f"with a vocabulary of {stated}; remove objective.vocabulary."
        )
    return given if stated is None else stated


def beyond_corpus(
    surroundings: Surroundings, vocabulary: int, given: int | None, field: str, count: int
) -> int:
    """The first of `count` ids that the objective takes for itself.

    Args:
        given: what `objective.FIELD` says; by default they follow the vocabulary.

    Raises:
        UserError: the model has no embedding for them.
    """
    first = vocabulary if given is None else given
    if first + count > surroundings.model_vocabulary:
        ids = f"id {first}" if count == 1 else f"ids {first} to {first + count - 1}"
        reason = (
            f"the first after the vocabulary {vocabulary} of the corpus {surroundings.corpus_name}"
            if given is None
            else f"objective.{field}={given}"
        )
        raise UserError(
            f"the objective needs {ids} of its own ({reason}), but model.vocab_size is "
            f"{surroundings.model_vocabulary}; set model.vocab_size={first + count} or more, or a "
            f"lower objective.{field}."
        )
    return first
