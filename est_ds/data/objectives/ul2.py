"""UL2's mixture of denoisers (arXiv 2205.05131, section 3.1.2), one denoiser a sample.

R: short spans, few of them. S: the end of the text after its beginning (prefix LM). X: long
spans or many. An encoder-decoder reads the inputs in its encoder and is given the targets in its
decoder; a decoder-only model reads both in one stream, with causal attention, and its loss is on
the targets alone. A causal denoiser (decoder-only) has the whole text as targets.

Every sample has the same shape without padding or loss of tokens inside it: each denoiser takes
as many tokens of the window as fill the inputs exactly, and leaves the rest of the window out.
In one stream of T tokens, span corruption with s spans takes T - 2s - 1 tokens (mode token
included); prefix LM and causal all of it. With an encoder-decoder a window is as long as the
denoiser with the highest rate needs; shorter targets end in labels that are ignored.

Ids of its own, from `first_id` on: [R], [S], [X], then the sentinels.
"""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from est_ds.config.kinds import Positive
from est_ds.config.strict import Strict
from est_ds.data.objectives.base import Draws, Example, Objective, Settings, Surroundings
from est_ds.data.objectives.loss import IGNORED
from est_ds.data.objectives.spans import Sizes, corrupt, fitted, split
from est_ds.data.objectives.vocabulary import beyond_corpus, corpus_vocabulary
from est_ds.errors import UserError
from est_ds.plans.draw import KEY_RANGE

# Purposes of draws.
DENOISER, NOISE, KEPT = 0, 1, 2
MODES = ("R", "S", "X")

Kind = Literal["span", "prefix", "causal"]
Rate = Annotated[float, Field(gt=0.0, lt=1.0)]


class Denoiser(Strict):
    """One denoiser of a mixture.

    Attributes:
        kind: `span`: spans of the text become targets; `prefix`: its end does; `causal`: all of it.
        rate: share of the text that becomes targets.
        mean: mean length of the spans of `span`, tokens.
        mode: token that the inputs begin with; None for none.
        weight: its share of the samples, relative to the other denoisers' weights.
    """

    kind: Kind
    rate: Rate | None = None
    mean: Annotated[float, Field(ge=1.0)] | None = None
    mode: Literal["R", "S", "X"] | None = None
    weight: Annotated[float, Field(gt=0.0)] = 1.0

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> Denoiser:
        wanted = {"span": {"rate", "mean"}, "prefix": {"rate"}, "causal": set()}[self.kind]
        for name in ("rate", "mean"):
            given = getattr(self, name) is not None
            if given and name not in wanted:
                raise ValueError(f"{name} has no effect with kind={self.kind}; remove it")
            if not given and name in wanted:
                raise ValueError(f"kind={self.kind} needs {name}; add it")
        return self


def _span(mode: str, mean: float, rate: float, weight: float = 1.0) -> Denoiser:
    return Denoiser(kind="span", mode=mode, mean=mean, rate=rate, weight=weight)


PRESETS = {
    # Table 1, in equal shares.
    "ul2": (
        _span("R", 3, 0.15),
        _span("R", 8, 0.15),
        Denoiser(kind="prefix", mode="S", rate=0.25),
        _span("X", 3, 0.5),
        _span("X", 8, 0.5),
        _span("X", 64, 0.15),
        _span("X", 64, 0.5),
    ),
    # The mix of RaPTr's 1.6B model (arXiv 2402.05913): 60 % causal, 20 % prefix, 20 %
    # span corruption. Rates and spans, which it does not name, are UL2's S and first R.
    "causal_prefix_span": (
        Denoiser(kind="causal", weight=0.6),
        Denoiser(kind="prefix", mode="S", rate=0.25, weight=0.2),
        _span("R", 3, 0.15, weight=0.2),
    ),
}


class Ul2(Objective):
    """A mixture of denoisers with exact sizes.

    Attributes:
        sizes: of the examples of every denoiser.
        first_sentinel: id of the first sentinel; the modes' ids are the three before it.
    """

    def __init__(
        self,
        denoisers: tuple[Denoiser, ...],
        *,
        sequence: int,
        first_id: int,
        decoder_start: int | None = None,
    ) -> None:
        """
        Args:
            decoder_start: first input of the decoder; None for a decoder-only model.

        Raises:
            UserError: a denoiser finds no room in `sequence` tokens.
        """
        self.denoisers = denoisers
        self.sequence = sequence
        self.first_id = first_id
        self.first_sentinel = first_id + len(MODES)
        self.decoder_start = decoder_start
        self.sizes = tuple(self._fit(denoiser) for denoiser in denoisers)
        if decoder_start is None:
            self.window, self.stride = sequence + 1, sequence
        else:
            self.window = self.stride = max(sizes.tokens for sizes in self.sizes)
            self.target_sequence = max(sizes.targets for sizes in self.sizes)
        total = sum(denoiser.weight for denoiser in denoisers)
        shares = accumulate(denoiser.weight / total for denoiser in denoisers)
        self._bounds = np.array([share * KEY_RANGE for share in shares][:-1])
        named = [denoiser.model_dump(mode="json") for denoiser in denoisers]
        self.identity = f"ul2 {json.dumps([named, first_id, decoder_start], sort_keys=True)}"

    @property
    def num_own_ids(self) -> int:
        """Ids beyond the tokenizer's that the examples may hold."""
        return len(MODES) + max(sizes.spans for sizes in self.sizes) + 1

    @property
    def own_tokens(self) -> dict[int, str]:
        """Modes and sentinels, these by T5's names."""
        modes = [f"<mode_{mode}>" for mode in MODES]
        sentinels = [f"<extra_id_{i}>" for i in range(self.num_own_ids - len(MODES))]
        return dict(enumerate(modes + sentinels, self.first_id))

    def _fit(self, denoiser: Denoiser) -> Sizes:
        num_modes = 0 if denoiser.mode is None else 1
        one_stream = self.decoder_start is None
        # A stream of T + 1 tokens gives T inputs and T labels.
        room = self.sequence + (1 if one_stream else 0) - num_modes
        if denoiser.kind == "causal":
            # Of the text's first token there is no prediction, unless a mode stands before it.
            return Sizes(tokens=room, noise=self.sequence, spans=0)
        if one_stream:
            sizes = fitted(room, lambda s: s.inputs + s.targets, denoiser.rate, denoiser.mean)
        else:
            sizes = fitted(room, lambda s: s.inputs, denoiser.rate, denoiser.mean)
        kept = sizes.tokens - sizes.noise
        if min(kept, sizes.noise) < max(1, sizes.spans):
            raise UserError(
                f"data.sequence={self.sequence} is too short for the denoiser "
                f"{_words(denoiser)}: it makes {sizes.spans or 1} spans, which need at least one "
                f"token each to take out and one to keep, but it has {sizes.noise} to take out "
                f"and {kept} to keep; use a longer data.sequence."
            )
        return sizes

    def _index(self, draws: Draws) -> int:
        return int(np.searchsorted(self._bounds, draws.keys(DENOISER, 1)[0], side="right"))

    def num_targets(self, draws: Draws) -> int:
        return self.sizes[self._index(draws)].targets

    def example(self, tokens: np.ndarray, draws: Draws) -> Example:
        index = self._index(draws)
        inputs, targets = self._cut(index, tokens[: self.sizes[index].tokens], draws)
        mode = self.denoisers[index].mode
        if mode is not None:
            inputs = np.concatenate([[self.first_id + MODES.index(mode)], inputs])
        if self.decoder_start is None:
            return _one_stream(inputs, targets)
        return self._two_streams(inputs, targets)

    def _cut(self, index: int, text: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (without the mode) and targets of a text."""
        sizes = self.sizes[index]
        num_kept = sizes.tokens - sizes.noise
        if not sizes.spans:
            return text[:num_kept], text[num_kept:]
        noise = split(sizes.noise, sizes.spans, draws.keys(NOISE, sizes.noise - 1))
        kept = split(num_kept, sizes.spans, draws.keys(KEPT, num_kept - 1))
        return corrupt(text, kept, noise, self.first_sentinel)

    def _two_streams(self, inputs: np.ndarray, targets: np.ndarray) -> Example:
        labels_T = np.full(self.target_sequence, IGNORED, np.int64)
        labels_T[: len(targets)] = targets
        decoder_T = np.full(self.target_sequence, self.decoder_start, np.int64)
        decoder_T[1 : len(targets)] = targets[:-1]
        return Example((inputs, decoder_T), labels_T)


def _one_stream(inputs: np.ndarray, targets: np.ndarray) -> Example:
    stream = np.concatenate([inputs, targets])
    labels_T = stream[1:].copy()
    labels_T[: max(0, len(inputs) - 1)] = IGNORED
    return Example((stream[:-1],), labels_T)


def _words(denoiser: Denoiser) -> str:
    given = denoiser.model_dump(exclude_none=True, exclude={"weight"})
    return "{" + ", ".join(f"{name}: {value}" for name, value in given.items()) + "}"


class Ul2Settings(Settings):
    """Either a mixture by name, or the denoisers themselves.

    Attributes:
        mixture: `ul2` or `causal_prefix_span` (default: `ul2`).
        denoisers: a mixture of the user's own.
        first_id: first of the ids of modes and sentinels (default: after the vocabulary).
        vocabulary: of the tokenizer; only for a corpus without a manifest.
    """

    heads: ClassVar[tuple[str, ...]] = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")

    name: Literal["ul2"] = "ul2"
    mixture: Literal["ul2", "causal_prefix_span"] | None = None
    denoisers: Annotated[tuple[Denoiser, ...], Field(min_length=1)] | None = None
    first_id: Annotated[int, Field(ge=0)] | None = None
    vocabulary: Positive | None = None

    @property
    def mixed(self) -> tuple[Denoiser, ...]:
        return self.denoisers or PRESETS[self.mixture or "ul2"]

    def check(self, encoder_decoder: bool) -> None:
        if self.mixture and self.denoisers:
            raise UserError(
                f"objective.mixture={self.mixture!r} and objective.denoisers are both set; remove "
                f"one of them."
            )
        if encoder_decoder and any(d.kind == "causal" for d in self.mixed):
            raise UserError(
                "objective.name='ul2' with a causal denoiser leaves the encoder of an "
                "encoder-decoder nothing to read; use objective.mixture=ul2, or denoisers of kind "
                "span and prefix."
            )

    def target_sequence(self, sequence: int) -> int:
        return Ul2(self.mixed, sequence=sequence, first_id=0, decoder_start=0).target_sequence

    def build(self, surroundings: Surroundings) -> Ul2:
        vocabulary = corpus_vocabulary(surroundings, self.vocabulary)
        objective = Ul2(
            self.mixed,
            sequence=surroundings.sequence,
            first_id=vocabulary if self.first_id is None else self.first_id,
            decoder_start=surroundings.decoder_start,
        )
        beyond_corpus(surroundings, vocabulary, self.first_id, "first_id", objective.num_own_ids)
        return objective
