"""Batches of samples, addressed by step and independent of the layout.

A sample is what the objective makes of a window of a corpus's stream; window i starts at token
i * stride. In next-token prediction the stride is `sequence` and a window has one token more.

Shapes: B micro-batch, T sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from est_ds.config.sections import Batch as BatchSettings
from est_ds.config.start import Reading
from est_ds.data.indexed import Corpus
from est_ds.data.mixture import Mixture, PhaseWeights
from est_ds.data.objectives.base import HELD_OUT, TRAINING, Draws, Example, Objective
from est_ds.data.objectives.causal import Causal
from est_ds.data.objectives.loss import IGNORED, Labels
from est_ds.data.order import positions
from est_ds.data.streams import ShuffledStream, Stream
from est_ds.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Input ids [B, T] (of an encoder-decoder also the decoder's; where documents are kept apart also
# the ids' positions in their documents), and labels [B, T]: alone where every one is a target,
# otherwise with a divisor [] such that the sum of a micro-batch's losses over it, averaged over the
# step's micro-batches, is the mean over the step's targets.
Inputs: TypeAlias = "Tensor | tuple[Tensor, ...]"


@dataclass(frozen=True)
class Portion:
    """What one replica reads.

    Attributes:
        replica: 0 <= replica < num_replicas.
        micro: samples a micro-batch, B.
    """

    replica: int
    num_replicas: int
    micro: int

    def __post_init__(self) -> None:
        assert 0 <= self.replica < self.num_replicas and self.micro >= 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a sample is.

    Attributes:
        sequence: input tokens, T.
        objective: next-token prediction if None.
        separate: whether samples keep their documents apart.
    """

    sequence: int
    objective: Objective | None = None
    separate: bool = False


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """Which samples a step takes.

    Attributes:
        global_batch: samples a step, over all replicas and micro-batches.
        seed: key of the order and of the objective's draws.
        weights: of several corpora, by step; not needed for one.
        shuffled: whether documents are permuted in every epoch, before they are cut.
        reading: where the corpora stood when a step began from which on all of this holds.
    """

    global_batch: int
    seed: int
    weights: tuple[PhaseWeights, ...] = (PhaseWeights(0, (1.0,)),)
    shuffled: bool = False
    reading: Reading | None = None


class Windows:
    """The samples of one corpus.

    Args:
        corpus: The corpus.
        sampling: What a sample is.
        stream: What windows are cut from; the corpus in its own order if None.
        choice: Which samples `held_out` gives: `even` over the corpus, or the `first` ones.

    Attributes:
        num_samples: Whole windows in the corpus.

    Raises:
        UserError: The corpus is shorter than one window.
    """

    def __init__(
        self,
        corpus: Corpus,
        sampling: Sampling,
        *,
        stream: Stream | None = None,
        choice: Literal["even", "first"] = "even",
    ) -> None:
        sequence = sampling.sequence
        if sequence < 1:
            raise UserError(f"data.sequence={sequence} is not allowed; use at least 1 token.")
        self.corpus = corpus
        self.sequence, self.separate = sequence, sampling.separate
        self.objective = sampling.objective or Causal(sequence)
        self.stream = stream or Stream(corpus)
        self.choice = choice
        assert self.objective.sequence == sequence
        window, stride = self.objective.window, self.objective.stride
        self.num_samples = max(0, corpus.num_tokens - window + stride) // stride
        if self.num_samples < 1:
            raise UserError(
                f"corpus {corpus.prefix}: {corpus.num_tokens} tokens hold no window of "
                f"data.sequence={sequence}, which takes {window} tokens; use at most "
                f"data.sequence={corpus.num_tokens * sequence // window}, or a larger corpus."
            )

    def example(self, sample: int, draws: Draws, epoch: int = 0) -> Example:
        """A sample, 0 <= sample < num_samples."""
        where = (epoch, int(sample) * self.objective.stride, self.objective.window)
        example = self.objective.example(self.stream.read(*where), draws)
        if not self.separate:
            return example
        starts = self.stream.starts(*where)
        return example.separated(starts, self.objective.crossing(starts))

    def num_targets(self, sample: int, draws: Draws, epoch: int = 0) -> int:
        """Labels of a sample that count. Reads no token, and the index where documents are
        apart."""
        targets = self.objective.num_targets(draws)
        if not self.separate:
            return targets
        where = (epoch, int(sample) * self.objective.stride, self.objective.window)
        return targets - len(self.objective.crossing(self.stream.starts(*where)))

    def divisor(self, num_targets: Iterator[int], micro: int) -> Tensor | None:
        """Targets of a micro-batch if they were spread evenly over the samples; None if every label
        is one.

        Args:
            num_targets: of all samples that are averaged over, as far as they are needed.
        """
        if isinstance(self.objective, Causal) and not self.separate:
            return None
        counts = list(num_targets)
        # Without any target the sum of the losses is 0, and so must their mean be.
        import torch

        return torch.tensor(micro * (max(sum(counts), 1) / len(counts)), dtype=torch.float32)

    def held_out(self, count: int, portion: Portion) -> Iterator[tuple[Inputs, Labels]]:
        """One replica's portion of `count` samples, always the same ones.

        Every replica gets the same number of micro-batches; rows past `count` have token 0
        and label -100 throughout, and a whole micro-batch may be such rows. A loss that
        does not depend on the layout is the mean over all replicas' micro-batches, times the
        rows of these over `count`.

        Yields:
            Inputs and labels, int64.

        Raises:
            UserError: The corpus has fewer than `count` samples.
        """
        if not 1 <= count <= self.num_samples:
            raise UserError(
                f"evaluate.sequences={count} is not allowed: the held-out corpus "
                f"{self.corpus.prefix} has {self.num_samples} windows of "
                f"data.sequence={self.sequence}; use 1 to {self.num_samples}."
            )
        return self._held_out(count, portion)

    def _held_out(self, count, portion):
        micro = portion.micro
        self.corpus.check_unchanged()
        drawn = [(s, Draws(0, HELD_OUT, i)) for i, s in enumerate(self.held_out_samples(count))]
        divisor = self.divisor((self.num_targets(*sample) for sample in drawn), micro)
        # Micro-batches go round the replicas, so that padding gathers in the last round.
        for start in range(0, count, portion.num_replicas * micro):
            first = start + portion.replica * micro
            rows = [self.example(*sample) for sample in drawn[first : first + micro]]
            rows += [self._nothing()] * (micro - len(rows))
            yield stacked(rows, divisor)

    def held_out_samples(self, count: int) -> list[int]:
        """The samples that are evaluated: the middles of `count` equal parts, or the first ones."""
        if self.choice == "first":
            return list(range(count))
        return [(2 * i + 1) * self.num_samples // (2 * count) for i in range(count)]

    def bits_per_byte(self, nats_per_token: float) -> float | None:
        """A held-out loss per byte of text; None where the manifest does not know the bytes, or the
        objective does not predict all of it."""
        manifest = self.corpus.manifest
        if manifest is None or not isinstance(self.objective, Causal):
            return None
        return manifest.bits_per_byte(nats_per_token, apart=self.separate)

    def _nothing(self) -> Example:
        """A row without a target."""
        inputs = tuple(np.zeros(length, np.int64) for length in self.objective.input_lengths)
        row = Example(inputs, np.full_like(inputs[-1], IGNORED))
        nowhere = np.array([], np.int64)
        return row.separated(nowhere, nowhere) if self.separate else row


def stacked(rows: list[Example], divisor: Tensor | None) -> tuple[Inputs, Labels]:
    """A micro-batch of samples."""
    parts = zip(*(row.inputs for row in rows), strict=True)
    import torch

    inputs = tuple(torch.from_numpy(np.stack(part)) for part in parts)
    labels_BT = torch.from_numpy(np.stack([row.labels for row in rows]))
    return (
        inputs if len(inputs) > 1 else inputs[0],
        labels_BT if divisor is None else (labels_BT, divisor),
    )


class Batches:
    """Training batches: step s takes the next `global_batch` samples of the order.

    What a step trains on depends on the arguments here and the step; the layout only says which
    process reads which part.

    Args:
        corpora: The training corpora.
        sampling: What a sample is.
        ordering: Which samples a step takes.

    Attributes:
        corpora: Samples of every corpus.
        mixture: Which corpus every sample comes from.

    Raises:
        UserError: A corpus is shorter than one window or than its part of one global batch.
    """

    def __init__(self, corpora: Sequence[Corpus], sampling: Sampling, ordering: Ordering) -> None:
        self.global_batch, self.seed = ordering.global_batch, ordering.seed

        def stream(i: int, corpus: Corpus) -> Stream | None:
            if not ordering.shuffled:
                return None
            return ShuffledStream(corpus, seed=ordering.seed, corpus_index=i)

        self.corpora = [Windows(c, sampling, stream=stream(i, c)) for i, c in enumerate(corpora)]
        self.mixture = Mixture(ordering.weights, ordering.global_batch, ordering.reading)
        assert self.mixture.num_corpora == len(corpora)
        self.sequence = sampling.sequence
        self.objective = self.corpora[0].objective
        self._check_sizes()

    def _check_sizes(self) -> None:
        """A step that read a sample twice would be no sample of the order."""
        for windows, needed in zip(self.corpora, self.mixture.most(self.global_batch)):
            if not needed <= windows.num_samples:
                of_it = "" if len(self.corpora) == 1 else f", of which up to {needed} are its own"
                raise UserError(
                    f"batch.global={self.global_batch} is not allowed{of_it}: the corpus "
                    f"{windows.corpus.prefix} has {windows.num_samples} windows of "
                    f"data.sequence={self.sequence}; use "
                    f"{f'1 to {windows.num_samples}' if not of_it else 'a smaller batch or weight'}"
                    f", a shorter data.sequence or a larger corpus."
                )

    @property
    def fingerprint(self) -> str:
        """Names the contents of the corpora, in their order."""
        return "+".join(windows.corpus.fingerprint for windows in self.corpora)

    def samples(
        self, step: int, rows: range | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Corpus, epoch and window of samples of a step; costs the same for every step.

        Args:
            rows: which of the global batch, one after the other; all if None.

        Returns:
            int64 [rows] each.
        """
        some = range(self.global_batch) if rows is None else rows
        first = step * self.global_batch + some.start
        corpora, numbers = self.mixture.locate(first, len(some))
        epochs, ids = np.empty_like(numbers), np.empty_like(numbers)
        for i, windows in enumerate(self.corpora):
            places = np.flatnonzero(corpora == i)
            if places.size:  # a corpus's samples of a step follow each other in its own order
                first = int(numbers[places[0]])
                ids[places] = positions(
                    first, len(places), windows.num_samples, self.seed, corpus=i
                )
                epochs[places] = numbers[places] // windows.num_samples
        return corpora, epochs, ids

    def digest(self, step: int) -> str:
        """16 hex characters that name the data of a step: equal means equal samples."""
        corpora, epochs, ids = self.samples(step)
        state = hashlib.sha256(f"{self.fingerprint} {self.sequence} ".encode())
        state.update(ids.astype("<i8").tobytes())
        if len(self.corpora) > 1:
            state.update(corpora.astype("<i8").tobytes())
        if order := self.corpora[0].stream.identity:
            state.update(f" {order} ".encode() + epochs.astype("<i8").tobytes())
        if self.corpora[0].separate:
            state.update(b" documents apart")
        if self.objective.identity:
            first = step * self.global_batch
            state.update(f" {self.objective.identity} {self.seed} {first}".encode())
        return state.hexdigest()[:16]

    def micro_batches(self, step: int, portion: Portion) -> Iterator[tuple[Inputs, Labels]]:
        """The accumulation micro-batches of one replica.

        Yields:
            Inputs and labels, int64, global_batch / (num_replicas * micro) times.

        Raises:
            LocalFailure: A file of a corpus is no longer what it was.
            UserError: num_replicas * micro does not divide global_batch.
        """
        batch = BatchSettings(global_=self.global_batch, micro=portion.micro)
        batch.accumulation(portion.num_replicas)  # raises
        return self._micro_batches(step, portion)

    def _micro_batches(self, step, portion):
        for windows in self.corpora:
            windows.corpus.check_unchanged()

        def of(function: str, rows: range) -> Iterator[Any]:
            for row, corpus, epoch, sample in zip(rows, *self.samples(step, rows)):
                draws = Draws(self.seed, TRAINING, step * self.global_batch + row)
                yield getattr(self.corpora[corpus], function)(int(sample), draws, int(epoch))

        whole, micro = self.global_batch, portion.micro
        divisor = self.corpora[0].divisor(of("num_targets", range(whole)), micro)
        own = whole // portion.num_replicas
        begin = portion.replica * own
        examples = of("example", range(begin, begin + own))
        for _ in range(own // micro):
            yield stacked(list(islice(examples, micro)), divisor)
