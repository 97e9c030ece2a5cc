"""Tasks of our own, made of the run's own held-out text: which of five words stands here?

`next_word`: given the text before it. `cloze`: given the text on both sides. The wrong words are
as frequent in the text as the right one, and have as many tokens. Nothing is drawn but by address:
the same corpora and tokenizer give the same items.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from est_ds.data.encoders import Encoder
from est_ds.data.indexed import Corpus
from est_ds.errors import UserError
from est_ds.score.likelihood import Scorer

NEXT_WORD, CLOZE = "next_word", "cloze"
TASKS = (NEXT_WORD, CLOZE)
CHOICES = 5
ITEMS = 400  # places in the text, over all corpora; some have no fitting word
_BEFORE, _AFTER = 96, 32  # tokens at most
_NEAR = 40  # words of neighbouring frequency, of which the wrong ones are drawn
_DRAW = 0x0E7A  # keeps the draws apart from those of training
# A word between a space and its end; not at the end of a text, which may be torn.
_WORD = re.compile(r"(?<=\S) ([^\W\d_]{3,})(?![\w\ufffd])(?=.)", re.DOTALL)


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        before, after: the text around the word, without the space before the word.
        choices: words.
        answer: number of the one that stands there.
    """

    before: str
    after: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Place:
    """A word in the text."""

    before: str
    word: str
    after: str


def make_items(
    corpora: list[Corpus], encoder: Encoder, scorer: Scorer, sequence: int, count: int
) -> list[Item]:
    """Makes the items of both tasks.

    Args:
        scorer: counts tokens.
        sequence: tokens that the model was trained on; a text is shorter.
        count: places that are looked at.

    Raises:
        UserError: the text has no place that fits.
    """
    each = -(-count // len(corpora))
    places = [p for corpus in corpora for p in _places(corpus, encoder, sequence, each)]
    ranks = _Ranks(places, scorer)
    items = [item for i, place in enumerate(places[:count]) if (item := ranks.item(i, place))]
    if not items:
        raise UserError(
            f"--tasks: the held-out text ({', '.join(c.prefix for c in corpora)}) has too few "
            f"words between spaces to ask for one of {CHOICES}; leave {NEXT_WORD} and {CLOZE} out, "
            f"or give a larger corpus (data.valid=PREFIX)."
        )
    return items


def correct(items: list[Item], task: str, scorer: Scorer, masked: bool) -> np.ndarray:
    """Returns which items a model gets right, bool [n]: its most likely choice is the answer."""
    asked = [(item, choice) for item in items for choice in item.choices]
    if masked:
        texts = [(f"{item.before} ", choice, item.after) for item, choice in asked]
        scores = scorer.within(texts)
    else:
        rest = [item.after if task == CLOZE else "" for item, _ in asked]
        pairs = [(i.before, f" {choice}{after}") for (i, choice), after in zip(asked, rest)]
        scores = scorer.after(pairs)
    best = np.array(scores).reshape(len(items), CHOICES).argmax(1)
    return best == np.array([item.answer for item in items])


class _Ranks:
    """Words of the text by their number of tokens, the most frequent first."""

    def __init__(self, places: list[Place], scorer: Scorer) -> None:
        texts = (f"{p.before} {p.word}{p.after}" for p in places)
        counts = Counter(word for text in texts for word in _WORD.findall(text))
        self._tokens = {word: scorer.num_tokens(f" {word}") for word in counts}
        self._by_tokens: dict[int, list[str]] = {}
        for word in sorted(counts, key=lambda word: (-counts[word], word)):
            self._by_tokens.setdefault(self._tokens[word], []).append(word)

    def item(self, number: int, place: Place) -> Item | None:
        """A question about a place; None if too few words are like the one that stands there."""
        like = self._by_tokens.get(self._tokens.get(place.word, 0), [])
        if len(like) < CHOICES:
            return None
        at = like.index(place.word)
        begin = max(0, min(at - _NEAR // 2, len(like) - _NEAR - 1))
        near = [word for word in like[begin : begin + _NEAR + 1] if word != place.word]
        keys = np.random.Philox(key=_DRAW, counter=[0, 0, 0, number]).random_raw(len(near) + 1)
        wrong = [near[i] for i in np.argsort(keys[1:], kind="stable")[: CHOICES - 1]]
        answer = int(keys[0] % CHOICES)
        choices = (*wrong[:answer], place.word, *wrong[answer:])
        return Item(place.before, place.after, choices, answer)


def _places(corpus: Corpus, encoder: Encoder, sequence: int, count: int) -> Iterator[Place]:
    """Words in the middle of texts that are spread evenly over a corpus."""
    before, after = min(_BEFORE, sequence // 2), min(_AFTER, sequence // 4)
    length = min(before + after, corpus.num_tokens)
    special = {encoder.bos_id, encoder.eos_id, encoder.unknown_id}
    for i in range(count):
        start = (2 * i + 1) * (corpus.num_tokens - length) // (2 * count)
        ids = _longest(corpus.window(start, length).tolist(), special)
        if 2 * len(ids) < length:  # a text of several documents
            continue
        text = encoder.decode(ids)
        middle = len(encoder.decode(ids[: len(ids) * before // (before + after)]))
        if place := _place(text, middle):
            yield place


def _longest(ids: list[int], special: set[int | None]) -> list[int]:
    """The longest run without a special id: a part of one document."""
    runs: list[list[int]] = [[]]
    for id_ in ids:
        if id_ in special:
            runs.append([])
        else:
            runs[-1].append(id_)
    return max(runs, key=len)


def _place(text: str, middle: int) -> Place | None:
    """The first word from the middle of a text on."""
    match = _WORD.search(text, middle)
    return match and Place(text[: match.start()], match[1], text[match.end() :])
