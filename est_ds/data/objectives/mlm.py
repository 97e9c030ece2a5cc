"""BERT's masked language model (arXiv 1810.04805, section 3.1, task 1).

A window is `sequence` tokens of the stream of documents, packed one after the other with their
boundary tokens between them: RoBERTa's FULL-SENTENCES (arXiv 1907.11692, section 4.2). Unlike
RoBERTa's, an exact number of positions is chosen, so that the targets of a step are known.

Shapes: T tokens of a sample.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from est_ds.config.kinds import Positive, Share
from est_ds.data.objectives.base import Draws, Example, Objective, Settings, Surroundings
from est_ds.data.objectives.loss import IGNORED
from est_ds.data.objectives.vocabulary import beyond_corpus, corpus_vocabulary
from est_ds.errors import UserError
from est_ds.plans import draw

# Purposes of draws.
POSITIONS, FATES, REPLACEMENTS = 0, 1, 2


@dataclass(frozen=True)
class Masking:
    """How tokens are chosen and replaced.

    Attributes:
        num_targets: positions of a sample that are chosen.
        mask: share of them that becomes `mask_id`.
        random: share of them that becomes any token of the tokenizer, itself included.
        vocabulary: tokens of the tokenizer.
        special_ids: tokens that are never chosen.
    """

    num_targets: int
    mask: float
    random: float
    mask_id: int
    vocabulary: int
    special_ids: tuple[int, ...]


def mask_tokens(
    tokens_T: np.ndarray,
    masking: Masking,
    positions_T: np.ndarray,
    fates_T: np.ndarray,
    replacements_T: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks the tokens with the smallest of `positions_T`, by the keys given (uint32 [T] each).

    A window with fewer tokens that may be chosen than `num_targets` has them all chosen.

    Returns:
        Inputs and labels, int64 [T]; the label of a token that is not chosen is `IGNORED`.
    """
    candidates = np.flatnonzero(~np.isin(tokens_T, masking.special_ids))
    chosen = candidates[draw.smallest(positions_T[candidates], masking.num_targets)]
    inputs_T, labels_T = tokens_T.copy(), np.full_like(tokens_T, IGNORED)
    labels_T[chosen] = tokens_T[chosen]
    masked = draw.below(fates_T[chosen], masking.mask)
    replaced = draw.below(fates_T[chosen], masking.mask + masking.random) & ~masked
    inputs_T[chosen[masked]] = masking.mask_id
    at = chosen[replaced]
    inputs_T[at] = (replacements_T[at].astype(np.uint64) * np.uint64(masking.vocabulary)) >> 32
    return inputs_T, labels_T


class Mlm(Objective):
    """Windows of `sequence` tokens that do not overlap."""

    def __init__(self, sequence: int, masking: Masking) -> None:
        self.sequence = self.window = self.stride = sequence
        self.masking, self.mask_id = masking, masking.mask_id
        self.identity = f"mlm {json.dumps(asdict(masking), sort_keys=True)}"

    @property
    def own_tokens(self) -> dict[int, str]:
        return {self.masking.mask_id: "[MASK]"}

    def num_targets(self, draws: Draws) -> int:
        return self.masking.num_targets

    def example(self, tokens: np.ndarray, draws: Draws) -> Example:
        keys = [draws.keys(purpose, len(tokens)) for purpose in (POSITIONS, FATES, REPLACEMENTS)]
        inputs_T, labels_T = mask_tokens(tokens, self.masking, *keys)
        return Example((inputs_T,), labels_T)

    def crossing(self, starts: np.ndarray) -> np.ndarray:
        return starts[:0]  # a token is predicted at its own place


class MlmSettings(Settings):
    """Defaults are BERT's.

    Attributes:
        rate: share of the positions that are chosen: round(rate x sequence), at least 1.
        mask: share of the chosen that is replaced by the mask token.
        random: share of the chosen that is replaced by a random token; the rest stays.
        mask_id: the mask token (default: the first id after the corpus's vocabulary).
        vocabulary: of the tokenizer; only for a corpus without a manifest.
        special_ids: tokens never chosen (default: those around documents, by the manifest).
    """

    heads: ClassVar[tuple[str, ...]] = ("AutoModelForMaskedLM",)
    separable: ClassVar[bool] = True

    name: Literal["mlm"] = "mlm"
    rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    mask: Share = 0.8
    random: Share = 0.1
    mask_id: Annotated[int, Field(ge=0)] | None = None
    vocabulary: Positive | None = None
    special_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    def check(self, encoder_decoder: bool) -> None:
        if self.mask + self.random > 1.0:
            raise UserError(
                f"objective.mask={self.mask} and objective.random={self.random} are shares of "
                f"the chosen tokens and add up to more than 1; lower one of them."
            )

    def build(self, surroundings: Surroundings) -> Mlm:
        vocabulary = corpus_vocabulary(surroundings, self.vocabulary)
        mask_id = beyond_corpus(surroundings, vocabulary, self.mask_id, "mask_id", 1)
        special = surroundings.special_ids if self.special_ids is None else self.special_ids
        for token in special:
            if token >= vocabulary:
                raise UserError(
                    f"objective.special_ids holds {token}, which the tokenizer's vocabulary of "
                    f"{vocabulary} has not; use ids from 0 to {vocabulary - 1}."
                )
        return Mlm(
            surroundings.sequence,
            Masking(
                num_targets=max(1, round(self.rate * surroundings.sequence)),
                mask=self.mask,
                random=self.random,
                mask_id=mask_id,
                vocabulary=vocabulary,
                special_ids=tuple(special),
            ),
        )
