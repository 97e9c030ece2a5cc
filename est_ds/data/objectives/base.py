"""What an objective says: how a window of tokens becomes inputs and labels.

Shapes: T input tokens of a sample; of an encoder-decoder S source and T target tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from est_ds.config.strict import Strict
from est_ds.data.indexed import Corpus
from est_ds.data.objectives.loss import IGNORED, Labels, token_loss
from est_ds.plans import draw

if TYPE_CHECKING:
    from torch import Tensor

# Streams of draws, apart from each other and from every other use of the same seed.
TRAINING, HELD_OUT = 0x6D61736B, 0x68656C64


@dataclass(frozen=True)
class Draws:
    """The random draws of one sample: a pure function of these fields.

    Attributes:
        seed: the run's; 0 for held-out samples, which are the same in every run.
        stream: `TRAINING` or `HELD_OUT`.
        sample: in training the global position (step x global_batch + row), so that a sample is
            drawn anew in every epoch; held out the sample's id.
    """

    seed: int
    stream: int
    sample: int

    def keys(self, purpose: int, n: int) -> np.ndarray:
        """`n` uniform 32-bit keys, uint32 [n]; `purpose` tells the draws of a sample apart."""
        return draw.keys(self.seed, self.stream, purpose, self.sample, n)


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        inputs: what the model reads, int64: ids [T]; of an encoder-decoder source ids [S] and
            decoder ids [T].
        labels: int64 [T]; `IGNORED` where there is no target.
    """

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray

    def separated(self, starts: np.ndarray, crossing: np.ndarray) -> Example:
        """With the positions of the ids in their documents as another input, int64 [T], and without
        some labels.

        Args:
            starts: where documents begin in the window after its first token, sorted.
            crossing: labels to ignore.
        """
        ids_T, labels_T = self.inputs[-1], self.labels.copy()
        labels_T[crossing] = IGNORED
        begins_T = np.zeros(len(ids_T), np.int64)
        within = starts[starts < len(ids_T)]
        begins_T[within] = within
        positions_T = np.arange(len(ids_T)) - np.maximum.accumulate(begins_T)
        return Example((*self.inputs, positions_T), labels_T)


@dataclass(frozen=True)
class Surroundings:
    """What an objective must know of data and model.

    Attributes:
        sequence: `data.sequence`.
        model_vocabulary: rows of the model's embedding.
        decoder_start: first input of an encoder-decoder's decoder; None of any other model.
        corpus_name: prefixes of the training corpora, for errors.
        vocabulary: of its tokenizer; None where it has no manifest.
        special_ids: tokens around documents, as the manifests say.
    """

    sequence: int
    model_vocabulary: int
    decoder_start: int | None
    corpus_name: str
    vocabulary: int | None
    special_ids: tuple[int, ...]

    @classmethod
    def of(
        cls,
        corpora: Sequence[Corpus],
        *,
        sequence: int,
        model_vocabulary: int,
        decoder_start: int | None,
    ) -> Surroundings:
        """Of training corpora that one tokenizer made."""
        manifests = [corpus.manifest for corpus in corpora if corpus.manifest]
        around = {token for m in manifests for token in (m.bos_id, m.eos_id)}
        vocabularies = [corpus.vocabulary for corpus in corpora if corpus.vocabulary is not None]
        return cls(
            sequence=sequence,
            model_vocabulary=model_vocabulary,
            decoder_start=decoder_start,
            corpus_name=" and ".join(corpus.prefix for corpus in corpora),
            vocabulary=max(vocabularies, default=None),
            special_ids=tuple(sorted(around - {None})),
        )


class Objective(ABC):
    """Turns windows of the corpus into examples of a fixed shape.

    Attributes:
        sequence: input tokens of a sample (source tokens of an encoder-decoder).
        target_sequence: decoder tokens of an encoder-decoder; None of any other model.
        window: tokens of the corpus that a sample is made of, at most.
        stride: tokens from the start of a window to the start of the next.
        identity: text that names everything that the examples depend on besides tokens and
            draws; empty for plain next-token prediction.
        mask_id: the id that stands for a token to be predicted; None where there is none.
    """

    sequence: int
    target_sequence: int | None = None
    window: int
    stride: int
    identity: str
    mask_id: int | None = None

    @property
    def own_tokens(self) -> dict[int, str]:
        """Ids that the objective puts into samples besides the text's, and what a tokenizer may
        call them: names that texts do not hold."""
        return {}

    @abstractmethod
    def num_targets(self, draws: Draws) -> int:
        """Labels that count in this sample. It does not depend on the tokens, so that every
        process knows the targets of a whole step without reading it."""

    @abstractmethod
    def example(self, tokens: np.ndarray, draws: Draws) -> Example:
        """The sample of a window, int64 [window]."""

    def crossing(self, starts: np.ndarray) -> np.ndarray:
        """Labels of a sample that belong to another document than the token that predicts them.

        Only asked of objectives whose settings are `separable`; the others have none.

        Args:
            starts: where documents begin in the window after its first token, sorted.
        """
        raise NotImplementedError

    @property
    def input_lengths(self) -> tuple[int, ...]:
        """Lengths of an example's inputs; its labels are as long as the last."""
        if self.target_sequence is None:
            return (self.sequence,)
        return (self.sequence, self.target_sequence)


class Settings(Strict):
    """The `objective` section of a run file, of one objective.

    Attributes:
        heads: the library's classes of models that it can train.
        separable: whether its examples can keep documents apart (`Objective.crossing`).
    """

    heads: ClassVar[tuple[str, ...]]
    separable: ClassVar[bool] = False

    def check(self, encoder_decoder: bool) -> None:
        """Checks the settings against the kind of model.

        Raises:
            UserError: they do not fit.
        """

    def target_sequence(self, sequence: int) -> int:
        """Decoder tokens of a sample whose encoder reads `sequence` tokens.

        Only asked of objectives whose `heads` include an encoder-decoder; the others have none.

        Raises:
            UserError: `sequence` is too short for the settings.
        """
        raise NotImplementedError

    @staticmethod
    def loss(logits_BTV: Tensor, labels: Labels) -> Tensor:
        """Returns the loss of a micro-batch, a scalar; see `token_loss` for what it must heed."""
        return token_loss(logits_BTV, labels)

    @abstractmethod
    def build(self, surroundings: Surroundings) -> Objective:
        """The objective.

        Raises:
            UserError: the settings do not fit the data or the model.
        """
