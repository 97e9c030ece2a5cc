"""Tasks to fine-tune on that are made of a run's own held-out text, and need no other file.

`order`: two sentences (or lines) that follow each other; are they in the right order? `source`:
which held-out corpus is a passage from, as of two authors? The first four fifths of a corpus are
for training, the rest is the development set. What is drawn is drawn by address.
"""

from __future__ import annotations

import re

import numpy as np

from est_ds.data.encoders import Encoder
from est_ds.data.indexed import Corpus
from est_ds.errors import UserError
from est_ds.score.tasks import Examples, Task

ORDER, SOURCE = "order", "source"
MADE = (ORDER, SOURCE)
_MOST = 2500  # passages, over all corpora
_TOKENS = 96  # of a passage
_TRAINING = 0.8
_DRAW = 0x0E7B
_LEAST_WORDS = 3
_BETWEEN = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")

Labelled = tuple[str, str | None, float]


def make_task(name: str, corpora: dict[str, Corpus], encoder: Encoder) -> Task:
    """Makes a task of held-out corpora.

    Args:
        name: of `MADE`.
        corpora: by name.

    Raises:
        UserError: `source` of one corpus, or there is too little text.
    """
    if name == SOURCE and len(corpora) < 2:
        raise UserError(
            f"--task={SOURCE} asks which of several held-out corpora a text is from, and this run "
            f"has one; give data.valid='{{ONE: PREFIX, OTHER: PREFIX}}', or use --task={ORDER}."
        )
    examples: tuple[list[Labelled], list[Labelled]] = [], []
    by_corpus = [_passages(corpus, encoder, _MOST // len(corpora)) for corpus in corpora.values()]
    if name == SOURCE:  # as many of each
        by_corpus = [passages[: min(map(len, by_corpus))] for passages in by_corpus]
    # In turns, so that the first ones of all are some of each.
    for i in range(max(map(len, by_corpus))):
        for number, passages in enumerate(by_corpus):
            if i < len(passages):
                part = examples[i >= _TRAINING * len(passages)]
                whole = [(passages[i], None, float(number))]
                part += _pairs(passages[i], number, i) if name == ORDER else whole
    classes = ("swapped", "in order") if name == ORDER else tuple(corpora)
    if min(len({label for *_, label in part}) for part in examples) < len(classes):
        raise UserError(
            f"--task={name}: the held-out text ({', '.join(c.prefix for c in corpora.values())}) "
            f"is too short for it; give a larger corpus (data.valid=PREFIX), or a task's folder."
        )
    return Task(name, classes, "accuracy", *map(_examples, examples))


def _passages(corpus: Corpus, encoder: Encoder, most: int) -> list[str]:
    """Texts that follow each other in a corpus and do not overlap, each of one document."""
    count = min(most, corpus.num_tokens // _TOKENS)
    special = {encoder.bos_id, encoder.eos_id, encoder.unknown_id}
    texts = []
    for i in range(count):
        start = (2 * i + 1) * (corpus.num_tokens - _TOKENS) // (2 * count)
        ids = corpus.window(start, _TOKENS).tolist()
        ends = [j for j, id_ in enumerate(ids) if id_ in special]
        text = encoder.decode(ids[: ends[0]] if ends else ids).strip()
        if len(text.split()) >= _LEAST_WORDS:
            texts.append(text)
    return texts


def _pairs(text: str, corpus: int, number: int) -> list[Labelled]:
    """Pairs of neighbouring sentences within a passage, swapped or not."""
    sentences = _BETWEEN.split(text)[1:-1]  # the first and the last may be torn
    pairs = [p for p in zip(sentences[::2], sentences[1::2]) if _tells(*p)]
    address = [0, 0, corpus, number]
    keys = np.random.Philox(key=_DRAW, counter=address).random_raw(len(pairs))
    drawn = zip(pairs, keys.tolist())
    return [(a, b, 1.0) if key & 1 else (b, a, 0.0) for (a, b), key in drawn]


def _tells(first: str, second: str) -> bool:
    """Whether two sentences have an order that may be seen."""
    return first != second and min(len(s.split()) for s in (first, second)) >= _LEAST_WORDS


def _examples(rows: list[Labelled]) -> Examples:
    first, second, labels = zip(*rows)
    return Examples(first, None if second[0] is None else second, labels)
