"""Batches of samples, addressed by step and independent of the layout.

A sample is what the objective makes of a window of the corpus stream; window i starts at token
i * stride. In next-token prediction the stride is `sequence` and a window has one token more.

Shapes: B micro-batch, T sequence.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from est_ds.data.indexed import Corpus
from est_ds.data.objectives.base import HELD_OUT, IGNORED, TRAINING, Draws, Example, Objective
from est_ds.data.objectives.causal import Causal
from est_ds.data.order import positions
from est_ds.errors import UserError

# Input ids [B, T] (of an encoder-decoder also the decoder's), and labels [B, T]: alone where
# every one is a target, otherwise with a divisor [] such that the sum of a micro-batch's losses
# over it, averaged over the step's micro-batches, is the mean over the step's targets.
Inputs = Tensor | tuple[Tensor, ...]
Labels = Tensor | tuple[Tensor, Tensor]

class Windows:
    """The samples of a corpus in their own order; for evaluation.

    Args:
        corpus: The corpus.
        sequence: Input tokens a sample, T.
        objective: What a sample is; next-token prediction if None.

    Attributes:
        num_samples: Whole windows in the corpus.

    Raises:
        UserError: The corpus is shorter than one window.
    """

    def __init__(
        self, corpus: Corpus, *, sequence: int, objective: Objective | None = None
    ) -> None:
        if sequence < 1:
            raise UserError(f"data.sequence={sequence} is not allowed; use at least 1 token.")
        self.corpus = corpus
        self.sequence = sequence
        self.objective = objective or Causal(sequence)
        assert self.objective.sequence == sequence
        window, stride = self.objective.window, self.objective.stride
        self.num_samples = max(0, corpus.num_tokens - window + stride) // stride
        if self.num_samples < 1:
            raise UserError(
                f"corpus {corpus.prefix}: {corpus.num_tokens} tokens hold no window of "
                f"data.sequence={sequence}, which takes {window} tokens; use at most "
                f"data.sequence={corpus.num_tokens * sequence // window}, or a larger corpus."
            )

    def held_out(
        self, count: int, *, rank: int, world: int, micro: int
    ) -> Iterator[tuple[Inputs, Labels]]:
        """This rank's share of the first `count` samples, always the same ones.

        Every rank gets the same number of micro-batches; rows past `count` have token 0
        and label -100 throughout, and a whole micro-batch may be such rows. A loss that
        does not depend on the layout is the mean over all ranks' micro-batches, times the
        rows of these over `count`.

        Yields:
            Inputs and labels, int64.

        Raises:
            UserError: The corpus has fewer than `count` samples.
        """
        assert 0 <= rank < world and micro >= 1
        if not 1 <= count <= self.num_samples:
            raise UserError(
                f"evaluate.sequences={count} is not allowed: the held-out corpus "
                f"{self.corpus.prefix} has {self.num_samples} windows of "
                f"data.sequence={self.sequence}; use 1 to {self.num_samples}."
            )
        return self._held_out(count, rank, world, micro)

    def _held_out(self, count, rank, world, micro):
        draws = [Draws(0, HELD_OUT, i) for i in range(count)]
        divisor = self._divisor(draws, micro)
        # Micro-batches go round the ranks, so that padding gathers in the last round.
        for start in range(0, count, world * micro):
            first = start + rank * micro
            rows = [self._example(i, draws[i]) for i in range(first, min(first + micro, count))]
            rows += [self._nothing()] * (micro - len(rows))
            yield _stacked(rows, divisor)

    def _example(self, sample: int, draws: Draws) -> Example:
        objective = self.objective
        tokens = self.corpus.window(int(sample) * objective.stride, objective.window)
        return objective.example(tokens, draws)

    def _nothing(self) -> Example:
        """A row without a target."""
        inputs = tuple(np.zeros(length, np.int64) for length in self.objective.input_lengths)
        return Example(inputs, np.full_like(inputs[-1], IGNORED))

    def _divisor(self, draws: list[Draws], micro: int) -> Tensor | None:
        """Targets of a micro-batch if they were spread evenly over the samples; None if they are,
        every label being one."""
        if isinstance(self.objective, Causal):
            return None
        return torch.tensor(micro * self.objective.mean_targets(draws), dtype=torch.float32)


def _stacked(rows: list[Example], divisor: Tensor | None) -> tuple[Inputs, Labels]:
    parts = zip(*(row.inputs for row in rows), strict=True)
    inputs = tuple(torch.from_numpy(np.stack(part)) for part in parts)
    labels_BT = torch.from_numpy(np.stack([row.labels for row in rows]))
    return (
        inputs if len(inputs) > 1 else inputs[0],
        labels_BT if divisor is None else (labels_BT, divisor),
    )


class Batches(Windows):
    """Training batches: step s takes the next `global_batch` samples of the order.

    What a step trains on depends on corpus, objective, sequence, global_batch, seed and
    step; the layout only says which process reads which part.

    Args:
        corpus: The training corpus.
        sequence: Input tokens a sample, T.
        global_batch: Samples a step, over all replicas and micro-batches.
        seed: Key of the order and of the objective's draws.
        objective: What a sample is; next-token prediction if None.

    Raises:
        UserError: The corpus is shorter than one window or than one global batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence: int,
        global_batch: int,
        seed: int,
        objective: Objective | None = None,
    ) -> None:
        super().__init__(corpus, sequence=sequence, objective=objective)
        if not 1 <= global_batch <= self.num_samples:
            raise UserError(
                f"batch.global={global_batch} is not allowed: the corpus {corpus.prefix} has "
                f"{self.num_samples} windows of data.sequence={sequence}; use 1 to "
                f"{self.num_samples}, a shorter data.sequence or a larger corpus."
            )
        self.global_batch = global_batch
        self.seed = seed

    def sample_ids(self, step: int) -> np.ndarray:
        """Samples of a step, int64 [global_batch]. Costs the same for every step."""
        return positions(step * self.global_batch, self.global_batch, self.num_samples, self.seed)

    def digest(self, step: int) -> str:
        """16 hex characters that name the data of a step: equal means equal samples."""
        state = hashlib.sha256(f"{self.corpus.fingerprint} {self.sequence} ".encode())
        state.update(self.sample_ids(step).astype("<i8").tobytes())
        if self.objective.identity:
            first = step * self.global_batch
            state.update(f" {self.objective.identity} {self.seed} {first}".encode())
        return state.hexdigest()[:16]

    def micro_batches(
        self, step: int, *, rank: int, world: int, micro: int
    ) -> Iterator[tuple[Inputs, Labels]]:
        """The accumulation micro-batches of one data-parallel replica.

        Args:
            rank: This replica, 0 <= rank < world.
            world: Number of data-parallel replicas.
            micro: Samples a micro-batch, B.

        Yields:
            Inputs and labels, int64, global_batch / (world * micro) times.

        Raises:
            UserError: world * micro does not divide global_batch.
        """
        assert 0 <= rank < world and micro >= 1
        if self.global_batch % (world * micro):
            up = world * micro * -(-self.global_batch // (world * micro))
            raise UserError(
                f"batch.global={self.global_batch} is not a multiple of batch.micro={micro} x "
                f"data_parallel={world} (global_batch = micro_batch x accumulation x "
                f"data_parallel); use batch.global={up} or change batch.micro."
            )
        return self._micro_batches(step, rank, world, micro)

    def _micro_batches(self, step, rank, world, micro):
        first = step * self.global_batch
        draws = [Draws(self.seed, TRAINING, first + row) for row in range(self.global_batch)]
        divisor = self._divisor(draws, micro)
        ids = self.sample_ids(step)
        for rows in np.arange(self.global_batch).reshape(world, -1, micro)[rank]:
            yield _stacked([self._example(ids[row], draws[row]) for row in rows], divisor)
