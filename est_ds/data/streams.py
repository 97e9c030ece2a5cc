"""The stream of tokens that an epoch's windows are cut from, and where documents begin in it.

`Stream` is the corpus as it lies on disk. `ShuffledStream` has the documents in another order in
every epoch: every block of `BLOCK` neighbouring documents is permuted by itself, so that a block
begins at the same token in every epoch and any token is found by a binary search in the index,
without a table of the corpus. What that costs: a document's neighbours always come from its own
block. Windows from all over the corpus meet in a batch through the order of the windows, which is
a permutation of the whole epoch (order.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from est_ds.data.indexed import Corpus
from est_ds.data.order import shuffled_block

BLOCK = 1024
_CACHED_BLOCKS = 64
_CACHED_STARTS = 1 << 16  # a few MB
_READ_AT_ONCE = 32


class Stream:
    """A corpus in its own order; the same in every epoch."""

    identity = ""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        # A search asks for the same documents in the middle again and again.
        self._start = lru_cache(_CACHED_STARTS)(self._read_start)

    def read(self, epoch: int, first: int, length: int) -> np.ndarray:
        """Tokens [first, first + length) of the epoch's stream, int64 [length]."""
        return self.corpus.window(first, length)

    def starts(self, epoch: int, first: int, length: int) -> np.ndarray:
        """Where documents begin in that window after its first token: sorted, in [1, length)."""
        end = first + length
        document = _last_at_most(first, self._start, self.corpus.num_documents) + 1
        found = [np.array([], np.int64)]
        while document < self.corpus.num_documents:
            last = min(document + _READ_AT_ONCE, self.corpus.num_documents)
            found.append(self.corpus.document_start(np.arange(document, last)))
            document = last
            if found[-1][-1] >= end:
                break
        # An empty document begins where the next one does.
        starts = np.unique(np.concatenate(found))
        return starts[starts < min(end, self.corpus.num_tokens)] - first

    def _read_start(self, document: int) -> int:
        return int(self.corpus.document_start(np.array([document]))[0])


class ShuffledStream(Stream):
    """A corpus whose documents are permuted in every epoch, block by block.

    Args:
        corpus_index: index among the corpora of a mixture.
    """

    def __init__(self, corpus: Corpus, *, seed: int, corpus_index: int = 0) -> None:
        super().__init__(corpus)
        self.identity = f"documents shuffled by {seed} in blocks of {BLOCK}"
        self._num_blocks = -(-corpus.num_documents // BLOCK)
        self._seed, self._index = seed, corpus_index
        self._block = lru_cache(_CACHED_BLOCKS)(self._read_block)

    def read(self, epoch: int, first: int, length: int) -> np.ndarray:
        tokens = np.empty(length, np.int64)
        for at, source, count in self._pieces(epoch, first, length):
            tokens[at : at + count] = self.corpus.window(source, count)
        return tokens

    def starts(self, epoch: int, first: int, length: int) -> np.ndarray:
        # A piece begins with a document, except at the start of the window.
        return np.array([at for at, _, _ in self._pieces(epoch, first, length) if at], np.int64)

    def _pieces(self, epoch: int, first: int, length: int) -> list[tuple[int, int, int]]:
        """The documents in a window: place in it, place in the corpus, tokens; none empty."""
        pieces = []
        end, block = first + length, self._block_at(first)
        at = first
        while at < end:
            sources, begins = self._block(epoch, block)
            document = int(np.searchsorted(begins, at, side="right")) - 1
            while at < end and document < len(sources):
                count = min(int(begins[document + 1]), end) - at
                if count:
                    source = int(sources[document]) + at - int(begins[document])
                    pieces.append((at - first, source, count))
                at += count
                document += 1
            block += 1
        return pieces

    def _read_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every document of a block, in the epoch's order, its place in the corpus [n]; and
        its place in the epoch's stream, with the end of the block [n + 1]."""
        first = block * BLOCK
        last = min(first + BLOCK, self.corpus.num_documents)
        starts = self.corpus.document_start(np.arange(first, last + 1))
        order = shuffled_block(last - first, self._seed, epoch, self._index, block)
        begins = starts[0] + np.concatenate([[0], np.cumsum(np.diff(starts)[order])])
        return starts[:-1][order], begins

    def _block_at(self, token: int) -> int:
        return _last_at_most(token, lambda block: self._start(block * BLOCK), self._num_blocks)


def _last_at_most(token: int, start_of: Callable[[int], int], count: int) -> int:
    """The largest i in range(count) with start_of(i) <= token; the first is."""
    return bisect_right(range(count), token, key=start_of) - 1
