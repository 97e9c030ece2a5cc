"""Span corruption (arXiv 1910.10683, section 3.1.4 and figure 2): pure functions of arrays.

A text of n tokens is cut into s kept and s noise spans in turn, a kept one first, all at least
one token long. Inputs are the kept spans, each followed by a sentinel; targets are, for every
noise span, its sentinel and its tokens, and at last one more sentinel that closes them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from est_ds.plans import draw


@dataclass(frozen=True)
class Sizes:
    """Exact sizes of an example, so that its shape is known before a token is read.

    Attributes:
        tokens: n, read from the corpus.
        noise: tokens of them that become targets.
        spans: s; 0 where the noise is the end of the text and there are no sentinels.
    """

    tokens: int
    noise: int
    spans: int

    @property
    def inputs(self) -> int:
        return self.tokens - self.noise + self.spans

    @property
    def targets(self) -> int:
        return self.noise + (self.spans + 1 if self.spans else 0)


def sizes_of(tokens: int, rate: float, mean: float | None) -> Sizes:
    """Sizes for a text of `tokens`: round(rate x tokens) noise tokens, at least one.

    Args:
        mean: of the noise spans' lengths; None for one span at the end.
    """
    noise = max(1, round(rate * tokens))
    return Sizes(tokens, noise, 0 if mean is None else max(1, round(noise / mean)))


def fitted(room: int, length: Callable[[Sizes], int], rate: float, mean: float | None) -> Sizes:
    """The sizes of the longest text whose `length` is exactly `room`.

    Rounding may leave a gap of a token or two: kept tokens fill it.

    Args:
        length: of what must fit; does not fall with the number of tokens, and grows by one with
            every kept token.
    """
    longest = int(room / (1.0 - rate)) + 2
    tokens = bisect_right(range(longest), room, key=lambda n: length(sizes_of(n, rate, mean))) - 1
    sizes = sizes_of(tokens, rate, mean)
    return Sizes(tokens + room - length(sizes), sizes.noise, sizes.spans)


def split(num_items: int, num_parts: int, keys: np.ndarray) -> np.ndarray:
    """Lengths of a uniformly drawn cut of `num_items` into `num_parts`, none empty.

    Args:
        keys: one for each place between two items, uint32 [num_items - 1].

    Returns:
        int64 [num_parts], whose sum is `num_items`.
    """
    cuts = draw.smallest(keys, num_parts - 1) + 1
    return np.diff(np.concatenate([[0], cuts, [num_items]]))


def corrupt(
    tokens: np.ndarray, kept: np.ndarray, noise: np.ndarray, first_sentinel: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a text.

    Args:
        kept: lengths of the kept spans [s].
        noise: lengths of the noise spans [s].
        first_sentinel: id of the first sentinel; the others follow it.
    """
    inputs, targets = [], []
    at = 0
    for i, (num_kept, num_noise) in enumerate(zip(kept, noise, strict=True)):
        sentinel = [first_sentinel + i]
        inputs += [tokens[at : at + num_kept], sentinel]
        at += num_kept
        targets += [sentinel, tokens[at : at + num_noise]]
        at += num_noise
    targets.append([first_sentinel + len(noise)])
    return np.concatenate(inputs), np.concatenate(targets)
