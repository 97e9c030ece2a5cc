"""Sources of rows with a column of text: .parquet files and Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config import SourceConfig
from data_prep.readers.base import (
    PIECE_BYTES,
    Document,
    Piece,
    Position,
    Reader,
    Rules,
    Skipped,
    file_identity,
    unreadable,
)
from est_ds.errors import Failure, UserError

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class RowsPiece(Piece):
    """Attributes: first is the number, from 0, of the first of its rows."""

    first: int
    rows: list[Any]

    def documents(self, rules: Rules, skipped: Skipped) -> Iterator[Document]:
        for number, text in enumerate(self.rows, self.first):
            id_ = f"{self.source}#{number}"
            if text is None:
                skipped.add("empty", id_)
                continue
            try:
                size = len(text.encode())
            except (AttributeError, UnicodeEncodeError):
                kind = type(text).__name__
                problem = f"--input: {self.source}, row {number}: a {kind} that is no valid text"
                self.invalid(rules, skipped, id_, f"{problem}; correct the row, remove it")
                continue
            if size > rules.max_document_bytes:
                skipped.add("too long", id_)
            else:
                yield Document(id_, text)


def _gathered(groups: Iterable[list[Any]]) -> Iterator[list[Any]]:
    """Rows gathered up to about `PIECE_BYTES` of text."""
    rows, size = [], 0
    for group in groups:
        rows += group
        size += _size(group)
        if size >= PIECE_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _texts(column: Any) -> list[Any]:
    """Strings of a column; what is not UTF-8 stays bytes, and is no valid text."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow

        return [_decoded(value) for value in column.cast(pyarrow.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _size(rows: list[Any]) -> int:
    return sum(len(text) for text in rows if isinstance(text, str))


class ParquetFile(Reader):
    def __init__(self, id_: str, path: Path, column: str) -> None:
        self.id, self.path, self.column = id_, path, column
        identity, self.stored_bytes = file_identity(id_, path)
        self.identity = f"{identity} {column}"

    def pieces(self, position: Position | None, rules: Rules) -> Iterator[Piece]:
        import pyarrow
        from pyarrow import parquet

        row = position["row"] if position else 0
        try:
            # Without a buffer of its own it would read a whole row group at once.
            with parquet.ParquetFile(self.path, buffer_size=PIECE_BYTES, pre_buffer=False) as file:
                self._check_column(file.schema_arrow)
                for rows in _gathered(self._groups(file, row)):
                    first, row = row, row + len(rows)
                    read = self.stored_bytes * row // file.metadata.num_rows
                    yield RowsPiece(self.id, _size(rows), {"row": row}, read, first, rows)
        except OSError as error:
            raise unreadable(self.path, error) from None
        except pyarrow.ArrowException as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"--input: {self.path} is not a whole .parquet file ({reason}); copy it again, or "
                f"leave it out."
            ) from None

    def _groups(self, file: Any, row: int) -> Iterator[list[Any]]:
        """Texts from a row on, a few at a time."""
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        first = 0
        while first < len(sizes) and sizes[first] <= row:
            row -= sizes[first]
            first += 1
        wanted = list(range(first, len(sizes)))
        if not wanted:
            return
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=wanted, columns=[self.column]):
            texts = _texts(batch.column(0))
            yield texts[row:]
            row = max(0, row - len(texts))

    def _check_column(self, schema: Any) -> None:
        from pyarrow import types

        if self.column not in schema.names:
            raise UserError(
                f"--input: {self.path} has no column {self.column!r}; it has "
                f"{', '.join(schema.names)}; name the one with the text (`text:` of the source, or "
                f"--text)."
            )
        if schema.names.count(self.column) > 1:
            raise UserError(
                f"--input: {self.path} has {schema.names.count(self.column)} columns "
                f"{self.column!r}, and which one holds the text cannot be known; rename the "
                f"others."
            )
        kind = schema.field(self.column).type
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
            raise UserError(
                f"--input: {self.path}: the column {self.column!r} holds {kind}, not strings; name "
                f"the one with the text (`text:` of the source, or --text)."
            )


class HubDataset(Reader):
    """A dataset that `datasets.load_dataset` finds: on the Hub, in its cache or in a folder.

    Raises:
        UserError: It cannot be loaded, or has no such column of strings.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.id = ":".join(filter(None, (config.dataset, config.name, config.split)))
        self.column, self.streaming = config.text, config.streaming
        self._dataset = self._load(config)
        settings = config.model_dump(mode="json", exclude_defaults=True)
        self.stored_bytes = None
        if not self.streaming:
            settings["rows"] = self._dataset.num_rows
            settings["files"] = sorted(Path(f["filename"]).name for f in self._dataset.cache_files)
            self.stored_bytes = max(1, self._dataset.data.nbytes)
        self.identity = json.dumps(settings, sort_keys=True)

    def _load(self, config: SourceConfig) -> Any:
        import datasets

        files = config.data_files
        if isinstance(files, dict):
            files = {k: list(v) if isinstance(v, tuple) else v for k, v in files.items()}
        elif isinstance(files, tuple):
            files = list(files)
        try:
            dataset = datasets.load_dataset(
                config.dataset,
                config.name,
                data_dir=config.data_dir,
                data_files=files,
                split=config.split,
                revision=config.revision,
                streaming=config.streaming,
            )
            # A streamed dataset learns its columns by reading its first rows.
            features = dataset.features or dataset._resolve_features().features
        except Exception as error:  # whatever the library, the file system or the network raise
            reason = " ".join(str(error).split())
            raise UserError(
                f"dataset {self.id} cannot be loaded ({type(error).__name__}: {reason}); check its "
                f"name, split and revision, the network, and whether it needs `hf auth login`."
            ) from None
        kind = getattr(features.get(self.column), "dtype", None)
        if kind not in ("string", "large_string"):
            held = f"holds {kind or 'no single value'}" if self.column in features else "is missing"
            raise UserError(
                f"dataset {self.id}: the column {self.column!r} {held}; it has "
                f"{', '.join(features)}; name the one with the text (`text:` of the source)."
            )
        return dataset.select_columns([self.column])

    def pieces(self, position: Position | None, rules: Rules) -> Iterator[Piece]:
        row = position["row"] if position else 0
        groups = self._streamed(position) if self.streaming else self._stored(row)
        try:
            for rows in _gathered(groups):
                first, row = row, row + len(rows)
                after = {"row": row}
                if self.streaming:
                    after["state"] = self._dataset.state_dict()
                    read = 0
                else:
                    read = self.stored_bytes * row // self._dataset.num_rows
                yield RowsPiece(self.id, _size(rows), after, read, first, rows)
        except Exception as error:  # whatever the library, the files or the network raise
            reason = " ".join(str(error).split())
            raise Failure(
                f"dataset {self.id}: reading stopped after row {row} ({type(error).__name__}: "
                f"{reason}); give the same command again."
            ) from error

    def _stored(self, row: int) -> Iterator[list[Any]]:
        for first in range(row, self._dataset.num_rows, _ROWS_AT_ONCE):
            yield self._dataset[first : first + _ROWS_AT_ONCE][self.column]

    def _streamed(self, position: Position | None) -> Iterator[list[Any]]:
        # Row by row: the library's state counts rows that it has handed out.
        if position:
            self._dataset.load_state_dict(position["state"])
        for row in self._dataset:
            yield [row[self.column]]
