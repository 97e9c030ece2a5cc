"""Tasks to fine-tune on: GLUE's files, or files like them, of text and label."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from est_ds.errors import UserError

# Columns of GLUE's and SuperGLUE's files: of the label, and of one text or two.
_LABELS = ("label", "gold_label", "Quality", "is_duplicate", "score")
_TEXTS = (
    ("sentence1", "sentence2"),
    ("#1 String", "#2 String"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
)
_DEVELOPMENT = ("dev", "dev_matched", "validation", "validation_matched", "val")
_FORMS = (".tsv", ".jsonl")
_COLA = "label without a name"
# Of the lines of a file: GLUE's QQP has some that are cut short.
_MOST_SKIPPED = 0.01


@dataclass(frozen=True)
class Examples:
    """Texts with labels.

    Attributes:
        first: texts.
        second: texts that go with them; None of a task of single texts.
        labels: numbers of the classes, or values.
        skipped: lines of the file that were cut short.
    """

    first: tuple[str, ...]
    second: tuple[str, ...] | None
    labels: tuple[float, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.first)

    def up_to(self, limit: int | None) -> Examples:
        """Returns the first ones."""
        second = None if self.second is None else self.second[:limit]
        return replace(self, first=self.first[:limit], second=second, labels=self.labels[:limit])


@dataclass(frozen=True)
class Task:
    """What a classifier is trained and measured on.

    Attributes:
        name: of the folder or the file.
        classes: names of the labels; empty where labels are values.
        metric: by which learning rates are compared.
        train, dev: the examples.
    """

    name: str
    classes: tuple[str, ...]
    metric: str
    train: Examples
    dev: Examples

    @property
    def guess(self) -> float | None:
        """The accuracy of the most frequent class of the training set; None of other metrics."""
        if self.metric != "accuracy":
            return None
        [(label, _)] = Counter(self.train.labels).most_common(1)
        return self.dev.labels.count(label) / len(self.dev)

    def up_to(self, limit: int | None) -> Task:
        """Returns the task with that many examples of both sets."""
        return replace(self, train=self.train.up_to(limit), dev=self.dev.up_to(limit))


@dataclass(frozen=True)
class _Table:
    """The columns of a file that count, as text."""

    file: Path
    label: str
    texts: list[tuple[str, ...]]
    labels: list[str]
    skipped: int


def read_task(path: Path) -> Task:
    """Reads a task of a folder with `train.tsv` or `train.jsonl`, or of such a file.

    The development set is in the file beside it whose name has `dev` or `validation` in place of
    `train`.

    Raises:
        UserError: a file is missing or of another form.
    """
    train_file = _training_file(path)
    train, dev = _table(train_file), _table(_development_file(train_file))
    if len(train.texts[0]) != len(dev.texts[0]):
        raise UserError(
            f"--task: {train.file} has {len(train.texts[0])} texts an example and {dev.file} has "
            f"{len(dev.texts[0])}; give both the same columns."
        )
    stem = train_file.stem.replace("train", "").strip("._-")
    name = stem or train_file.resolve().parent.name
    if _is_value(train):
        values = [_numbers(table) for table in (train, dev)]
        return _task(name, (), "spearman", [(train, values[0]), (dev, values[1])])
    key = int if all(label.removeprefix("-").isdecimal() for label in train.labels) else str
    classes = tuple(sorted(set(train.labels), key=key))
    number = {label: float(i) for i, label in enumerate(classes)}
    if unknown := sorted(set(dev.labels) - set(classes)):
        raise UserError(
            f"--task: {dev.file} has the label {unknown[0]!r:.40}, which {train.file} has not "
            f"({', '.join(classes)[:80]}); correct the label, or give a file with labels."
        )
    if len(classes) < 2:
        raise UserError(
            f"--task: every label of {train.file} is {classes[0]!r:.40}; a task has two or more."
        )
    metric = "matthews" if train.label == _COLA else "accuracy"
    tables = [(table, [number[label] for label in table.labels]) for table in (train, dev)]
    return _task(name, classes, metric, tables)


def _task(
    name: str, classes: tuple[str, ...], metric: str, tables: Sequence[tuple[_Table, list[float]]]
) -> Task:
    sets = []
    for table, labels in tables:
        first, *second = (tuple(column) for column in zip(*table.texts))
        sets.append(Examples(first, second[0] if second else None, tuple(labels), table.skipped))
    return Task(name, classes, metric, *sets)


def _training_file(path: Path) -> Path:
    if path.is_file():
        if "train" not in path.stem or path.suffix not in _FORMS:
            raise UserError(
                f"--task={str(path)!r} is no training file: its name must have 'train' in it and "
                f"end with .tsv or .jsonl, such as train.tsv beside dev.tsv."
            )
        return path
    found = [path / f"train{form}" for form in _FORMS if (path / f"train{form}").is_file()]
    if not found:
        raise UserError(
            f"--task={str(path)!r} holds no train.tsv nor train.jsonl; give the folder of a GLUE "
            f"task, its training file, or a task that est-ds makes (order, source)."
        )
    return found[0]


def _development_file(train: Path) -> Path:
    names = [train.name.replace("train", name) for name in _DEVELOPMENT]
    found = [train.with_name(name) for name in names if train.with_name(name).is_file()]
    if not found:
        raise UserError(f"--task: beside {train} there is no {' nor '.join(names)}; add one.")
    return found[0]


def _table(file: Path) -> _Table:
    """Reads a file's texts and labels.

    Raises:
        UserError: it is of another form.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--task: {file} cannot be read as UTF-8 text ({e}).") from None
    numbered = [(i, line.rstrip("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--task: {file} is empty; give a file with examples.")
    if file.suffix == ".jsonl":
        rows: list[dict[str, Any] | None] = list(_json_rows(file, numbered))
    else:
        rows = list(_tsv_rows(numbered))
    first = next((row for row in rows if row), None)
    if first is None:
        raise UserError(f"--task: {file} has a heading and no example; give one with examples.")
    label, texts = _columns(file, first)
    whole = [row for row in rows if row and all(row.get(c) is not None for c in (label, *texts))]
    skipped = len(rows) - len(whole)
    if skipped > _MOST_SKIPPED * len(rows):
        raise UserError(
            f"--task: {file} lacks {label!r} or {' or '.join(map(repr, texts))} in {skipped} of "
            f"{len(rows)} examples; every example needs them."
        )
    if other := [r[c] for r in whole for c in (label, *texts) if isinstance(r[c], list | dict)]:
        raise UserError(
            f"--task: {file} has {json.dumps(other[0])!s:.60} where a text or a label stands in "
            f"other tasks; write each as a text or a number."
        )
    return _Table(
        file,
        label,
        [tuple(str(row[name]) for name in texts) for row in whole],
        [_label_text(row[label]) for row in whole],
        skipped,
    )


def _json_rows(file: Path, numbered: list[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    for number, line in numbered:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f"--task: line {number} of {file} is no JSON object; each line is one example, as "
                f'{{"sentence1": "...", "sentence2": "...", "label": 1}}.'
            )
        yield row


def _tsv_rows(numbered: list[tuple[int, str]]) -> Iterator[dict[str, Any] | None]:
    """Rows by the names of the heading; None of one that is cut short. GLUE's files have no quotes:
    a quotation mark is a character."""
    heading, lines = numbered[0][1].split("\t"), numbered[1:]
    if not set(heading) & set(_LABELS) and len(heading) == 4 and heading[1] in ("0", "1"):
        heading, lines = ["source", _COLA, "star", "sentence"], numbered  # CoLA's has no heading
    for _, line in lines:
        cells = line.split("\t")
        yield dict(zip(heading, cells)) if len(cells) >= len(heading) else None


def _columns(file: Path, row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    label = next((name for name in (*_LABELS, _COLA) if name in row), None)
    texts = next((names for names in _TEXTS if row.keys() >= set(names)), None)
    if label is None or texts is None:
        known = _LABELS if label is None else [" and ".join(names) for names in _TEXTS]
        raise UserError(
            f"--task: {file} has no column of {'labels' if label is None else 'texts'}: it has "
            f"{', '.join(row)[:120]}; name it as GLUE does: {', '.join(known)}."
        )
    return label, texts


def _label_text(label: Any) -> str:
    if isinstance(label, bool):
        return str(int(label))
    return str(label)


def _is_value(table: _Table) -> bool:
    """Whether labels are values, as of STS-B, and not classes."""
    if table.label == "score":
        return True
    try:
        return not all(label.is_integer() for label in _numbers(table))
    except UserError:
        return False


def _numbers(table: _Table) -> list[float]:
    try:
        values = [float(label) for label in table.labels]
    except ValueError as e:
        raise UserError(
            f"--task: {table.file}: {table.label} is a value in other examples: {e}; correct it."
        ) from None
    if wrong := [label for label, value in zip(table.labels, values) if not math.isfinite(value)]:
        raise UserError(f"--task: {table.file}: {table.label}={wrong[0]} is no number; correct it.")
    return values
