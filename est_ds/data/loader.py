"""Batches of token windows, addressed by step and independent of the layout.

A sample is a window of `sequence` + 1 tokens of the corpus stream; sample i starts at
token i * sequence. Shapes: B micro-batch, T sequence.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from est_ds.data.indexed import Corpus
from est_ds.data.order import positions
from est_ds.errors import UserError

IGNORED = -100  # label that the loss leaves out


class Windows:
    """The samples of a corpus in their own order; for evaluation.

    Attributes:
        num_samples: Whole windows in the corpus: (num_tokens - 1) // sequence.

    Raises:
        UserError: The corpus is shorter than one window.
    """

    def __init__(self, corpus: Corpus, *, sequence: int) -> None:
        if sequence < 1:
            raise UserError(f"data.sequence={sequence} is not allowed; use at least 1 token.")
        self.corpus = corpus
        self.sequence = sequence
        self.num_samples = (corpus.num_tokens - 1) // sequence
        if self.num_samples < 1:
            raise UserError(
                f"corpus {corpus.prefix}: {corpus.num_tokens} tokens hold no window of "
                f"data.sequence + 1 = {sequence + 1} tokens; use at most data.sequence="
                f"{corpus.num_tokens - 1}, or a larger corpus."
            )

    def held_out(
        self, count: int, *, rank: int, world: int, micro: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's share of the first `count` samples, always the same ones.

        Every rank gets the same number of micro-batches; rows past `count` have token 0
        and label -100 throughout, and a whole micro-batch may be such rows. A loss that
        does not depend on the layout is the sum over tokens of all ranks, divided by
        the number of labels that are not -100: `count * sequence`.

        Yields:
            input_ids_BT and labels_BT, int64; labels are the next tokens.

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
        # Micro-batches go round the ranks, so that padding gathers in the last round.
        for start in range(0, count, world * micro):
            first = start + rank * micro
            ids = np.arange(first, min(first + micro, count))
            input_ids_BT = torch.zeros(micro, self.sequence, dtype=torch.int64)
            labels_BT = torch.full_like(input_ids_BT, IGNORED)
            if ids.size:
                input_ids_BT[: ids.size], labels_BT[: ids.size] = self._tensors(ids)
            yield input_ids_BT, labels_BT

    def _tensors(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.sequence + 1
        rows = np.stack([self.corpus.window(int(i) * self.sequence, length) for i in ids])
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Batches(Windows):
    """Training batches: step s takes the next `global_batch` samples of the order.

    What a step trains on depends on corpus, sequence, global_batch, seed and step; the
    layout only says which process reads which part.

    Args:
        corpus: The training corpus.
        sequence: Tokens a sample, T.
        global_batch: Samples a step, over all replicas and micro-batches.
        seed: Key of the order.

    Raises:
        UserError: The corpus is shorter than one window or than one global batch.
    """

    def __init__(self, corpus: Corpus, *, sequence: int, global_batch: int, seed: int) -> None:
        super().__init__(corpus, sequence=sequence)
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
        """16 hex characters that name the data of a step: equal means equal tokens."""
        state = hashlib.sha256(f"{self.corpus.fingerprint} {self.sequence} ".encode())
        state.update(self.sample_ids(step).astype("<i8").tobytes())
        return state.hexdigest()[:16]

    def micro_batches(
        self, step: int, *, rank: int, world: int, micro: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The accumulation micro-batches of one data-parallel replica.

        Args:
            rank: This replica, 0 <= rank < world.
            world: Number of data-parallel replicas.
            micro: Samples a micro-batch, B.

        Yields:
            input_ids_BT and labels_BT, int64, global_batch / (world * micro) times;
            labels are the next tokens.

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
        for ids in self.sample_ids(step).reshape(world, -1, micro)[rank]:
            yield self._tensors(ids)
