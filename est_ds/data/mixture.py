"""Which corpus every training sample comes from: a sequence that is computed, not drawn.

Within a phase of the data, corpus c with weight w_c (weights add up to 1) has had, after q samples
and for every q, strictly between q * w_c - 1 and q * w_c + 1 of them. Such a sequence is the
chairman assignment of R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32
(1980); earliest deadline first finds it: sample i of corpus c may stand at slots
floor(i / w_c), ..., ceil((i + 1) / w_c) - 1. Weights are decimal numbers, hence fractions, so the
sequence repeats after their common denominator. One period is kept, and any position is found in
constant time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush

import numpy as np

from est_ds.config.start import Reading
from est_ds.errors import UserError

LONGEST_PERIOD = 1_000_000
_MARK_EVERY = 4096


@dataclass(frozen=True)
class PhaseWeights:
    """Weights of the corpora from a step on.

    Attributes:
        from_step: first step of the phase; 0 for the first phase.
        weights: one a corpus, at least 0; their ratios count.
    """

    from_step: int
    weights: tuple[float, ...]

    @property
    def parts(self) -> tuple[int, ...]:
        """The weights as the smallest whole numbers in the same ratios.

        Raises:
            UserError: their sum is above `LONGEST_PERIOD`.
        """
        return whole_parts(self.weights)


class Mixture:
    """The corpora of all samples of a run, by global position (step x global_batch + row).

    Args:
        weights: the phases of the data, in order.
        global_batch: samples a step.
        reading: where the corpora stood when a step began from which on all of this holds; what is
            before that step has no position then. The phase under way begins its sequence there.

    Raises:
        UserError: weights whose sequence repeats too late to be exact.
    """

    def __init__(
        self, weights: Sequence[PhaseWeights], global_batch: int, reading: Reading | None = None
    ) -> None:
        self.num_corpora = len(weights[0].weights)
        reading = reading or Reading(step=0, samples=(0,) * self.num_corpora)
        over = sum(phase.from_step <= reading.step for phase in weights[1:])
        weights = weights[over:]
        self._firsts = [max(p.from_step, reading.step) * global_batch for p in weights]
        self._cycles = [_Cycle(phase.parts) for phase in weights]
        self._before = [np.array(reading.samples, np.int64)]
        assert len(reading.samples) == self.num_corpora
        for i, cycle in enumerate(self._cycles[:-1]):
            length = self._firsts[i + 1] - self._firsts[i]
            self._before.append(self._before[-1] + cycle.counts(length))

    def counts(self, position: int) -> np.ndarray:
        """Samples of each corpus before a position, int64 [corpora]."""
        phase = self._phase(position)
        return self._before[phase] + self._cycles[phase].counts(position - self._firsts[phase])

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the samples at positions first, ..., first + count - 1 come from.

        Returns:
            Corpora and numbers of the sample within its corpus's own order, int64 [count] each.
        """
        corpora, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            phase = self._phase(first + done)
            start = first + done - self._firsts[phase]
            end = self._firsts[phase + 1] if phase + 1 < len(self._firsts) else first + count
            length = min(first + count, end) - (first + done)
            here = slice(done, done + length)
            corpora[here] = self._cycles[phase].corpora(start, length)
            before = self.counts(first + done)
            for corpus in range(self.num_corpora):
                rows = done + np.flatnonzero(corpora[here] == corpus)
                numbers[rows] = before[corpus] + np.arange(len(rows))
            done += length
        return corpora, numbers

    def most(self, count: int) -> np.ndarray:
        """Upper bounds of the samples of each corpus among any `count` in a row of one phase."""
        return np.max([cycle.most(count) for cycle in self._cycles], axis=0)

    def _phase(self, position: int) -> int:
        return sum(first <= position for first in self._firsts) - 1


class _Cycle:
    """One phase: a sequence of corpora that repeats."""

    def __init__(self, parts: tuple[int, ...]) -> None:
        self.parts = parts
        self._period = quota_sequence(parts)
        blocks = range(0, len(self._period), _MARK_EVERY)
        inner = [self._count(self._period[i : i + _MARK_EVERY]) for i in blocks]
        self._marks = np.cumsum([np.zeros(len(parts), np.int64), *inner], axis=0)

    def _count(self, corpora: np.ndarray) -> np.ndarray:
        return np.bincount(corpora, minlength=len(self.parts))

    def counts(self, length: int) -> np.ndarray:
        rounds, rest = divmod(length, len(self._period))
        mark = rest // _MARK_EVERY
        inner = self._marks[mark] + self._count(self._period[mark * _MARK_EVERY : rest])
        return rounds * np.array(self.parts, np.int64) + inner

    def most(self, count: int) -> np.ndarray:
        parts, period = np.array(self.parts, np.int64), len(self._period)
        return -(-parts * count // period) + ((parts > 0) & (parts < period))

    def corpora(self, start: int, length: int) -> np.ndarray:
        return self._period[(start + np.arange(length)) % len(self._period)]


def whole_parts(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as the smallest whole numbers in the same ratios, as they are written in decimals.

    Raises:
        UserError: their sum, after which the sequence repeats, is above `LONGEST_PERIOD`.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * common) for weight in exact]
    divisor = math.gcd(*parts)
    period = sum(parts) // divisor
    if period > LONGEST_PERIOD:
        raise UserError(
            f"data: the weights {', '.join(map(str, weights))} have exact proportions only over "
            f"{period:,} sequences, more than {LONGEST_PERIOD:,}; round them to weights of at most "
            f"six decimals that add up to 1."
        )
    return tuple(part // divisor for part in parts)


@lru_cache(maxsize=16)
def quota_sequence(parts: tuple[int, ...]) -> np.ndarray:
    """One period of the sequence: entry s is the corpus at slot s, int16 [sum(parts)]."""
    period = sum(parts)
    sequence = np.empty(period, np.int16)
    # (slot where it may stand, corpus, i) of the next sample of every corpus, and
    # (last slot where it may stand, corpus, i) of those that may stand at this slot.
    waiting = [(0, corpus, 0) for corpus, part in enumerate(parts) if part]
    ready: list[tuple[int, int, int]] = []
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, corpus, i = heappop(waiting)
            heappush(ready, (-(-(i + 1) * period // parts[corpus]) - 1, corpus, i))
        deadline, corpus, i = heappop(ready)
        assert deadline >= slot
        sequence[slot] = corpus
        heappush(waiting, ((i + 1) * period // parts[corpus], corpus, i + 1))
    sequence.setflags(write=False)
    return sequence
