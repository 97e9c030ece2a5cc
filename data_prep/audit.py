"""What the tokens of a corpus say about how it was made: BOS and EOS, unknown tokens, density."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from est_ds.data.header import AGAIN, Header, read_header
from est_ds.errors import UserError

_BLOCK_TOKENS = 1 << 22
_BLOCK_DOCUMENTS = 1 << 20


@dataclass
class Audit:
    """Counts over documents that are not empty, and over tokens.

    Attributes:
        counts: how often every token occurs, int64 [vocabulary].
        documents: how many are not empty.
        start_right: of those, how many begin with BOS; end_right: end with EOS.
        start_twice: how many begin with two BOS; end_twice: end with two EOS.
    """

    counts: np.ndarray
    documents: int = 0
    start_right: int = 0
    end_right: int = 0
    start_twice: int = 0
    end_twice: int = 0

    def __iadd__(self, other: Audit) -> Audit:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self


def audit_shard(prefix: str, vocabulary: int, bos: int | None, eos: int | None) -> Audit:
    """Reads one pair of files to the last token.

    Args:
        bos: token that documents should begin with; None: not looked for.
        eos: token that they should end with; None: not looked for.

    Raises:
        UserError: The index has gaps, or a token lies outside the vocabulary.
    """
    header = read_header(prefix)
    audit = Audit(_counted(header, vocabulary))
    header.check_entries()
    tokens, (_, offsets, boundaries) = header.tokens(), header.arrays()
    size = header.dtype.itemsize
    for first in range(0, header.num_documents, _BLOCK_DOCUMENTS):
        sequences = boundaries[first : first + _BLOCK_DOCUMENTS + 1]
        # A document may begin behind the last sequence: the end, or one that is empty.
        inside = sequences < header.num_sequences
        begins = np.where(inside, offsets[np.where(inside, sequences, 0)], header.bin_bytes)
        _count_documents(audit, tokens, begins // size, bos, eos)
    return audit


def _count_documents(
    audit: Audit, tokens: np.ndarray, bounds: np.ndarray, bos: int | None, eos: int | None
) -> None:
    """Adds documents between neighbouring bounds."""
    begins, ends = bounds[:-1], bounds[1:]
    filled = ends > begins
    begins, ends = begins[filled], ends[filled]
    longer = ends > begins + 1
    audit.documents += len(begins)
    if bos is not None:
        right, second = tokens[begins] == bos, tokens[np.minimum(begins + 1, ends - 1)] == bos
        audit.start_right += int(right.sum())
        audit.start_twice += int((right & second & longer).sum())
    if eos is not None:
        right, second = tokens[ends - 1] == eos, tokens[np.maximum(ends - 2, begins)] == eos
        audit.end_right += int(right.sum())
        audit.end_twice += int((right & second & longer).sum())


def _counted(header: Header, vocabulary: int) -> np.ndarray:
    counts, tokens = np.zeros(vocabulary, np.int64), header.tokens()
    for start in range(0, header.num_tokens, _BLOCK_TOKENS):
        block = np.asarray(tokens[start : start + _BLOCK_TOKENS]).astype(np.int64)
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= vocabulary:
            raise UserError(
                f"{header.prefix}.bin: token {high if low >= 0 else low} is outside the vocabulary "
                f"{vocabulary} of the tokenizer; {AGAIN}"
            )
        counts += np.bincount(block, minlength=vocabulary)
    return counts
