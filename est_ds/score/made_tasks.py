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
_MOST = 2500  # examples of both sets together
_TOKENS = 64  # of a passage
_TRAINING = 0.8
_DRAW = 0x0E7B
_LEAST_WORDS = 3
_BETWEEN = re.compile(r"(?<=[.!?;:])\s+|\s*\n\s*")

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
    train: list[Labelled] = []
    dev: list[Labelled] = []
    for number, corpus in enumerate(corpora.values()):
        texts = _passages(corpus, encoder, _MOST // len(corpora))
        cut = round(_TRAINING * len(texts))
        for part, begin, end in ((train, 0, cut), (dev, cut, len(texts))):
            for i in range(begin, end):
                made = _pair(texts[i], number, i) if name == ORDER else (texts[i], None, number)
                if made:
                    part.append(made)
    classes = ("swapped", "in order") if name == ORDER else tuple(corpora)
    if min(len({label for *_, label in part}) for part in (train, dev)) < len(classes):
        raise UserError(
            f"--task={name}: the held-out text ({', '.join(c.prefix for c in corpora.values())}) "
            f"is too short for it; give a larger corpus (data.valid=PREFIX), or a task's folder."
        )
    return Task(name, classes, "accuracy", _examples(train), _examples(dev))


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


def _pair(text: str, corpus: int, number: int) -> Labelled | None:
    """Two neighbouring sentences within a text, swapped or not; None if it has no two."""
    sentences = _BETWEEN.split(text)[1:-1]  # the first and the last may be torn
    long = [len(s.split()) >= _LEAST_WORDS for s in sentences]
    at = [i for i in range(len(sentences) - 1) if long[i] and long[i + 1]]
    if not at:
        return None
    first, second = sentences[at[0]], sentences[at[0] + 1]
    if first == second:
        return None
    [key] = np.random.Philox(key=_DRAW, counter=[0, 0, corpus, number]).random_raw(1)
    return (first, second, 1.0) if key & 1 else (second, first, 0.0)


def _examples(rows: list[Labelled]) -> Examples:
    first, second, labels = zip(*rows)
    return Examples(first, None if second[0] is None else second, labels)
