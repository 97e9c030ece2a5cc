"""Files of many documents with something between them: .jsonl, plain or compressed, and .txt."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Delimiter:
    """What ends a document.

    Args:
        text: its bytes.
        any_line_end: whether a line break in it may also be that of Windows in the file.

    Attributes:
        longest: bytes that it may have in the file.
    """

    def __init__(self, text: bytes, any_line_end: bool = False) -> None:
        self.text, self.longest = text, len(text)
        self._pattern = None
        if any_line_end and b"\n" in text:
            self.text = text.replace(b"\r\n", b"\n")
            self.longest = len(self.text) + self.text.count(b"\n")
            self._pattern = re.compile(re.escape(self.text).replace(b"\\\n", b"\r?\n"))

    def split(self, content: bytes) -> list[bytes]:
        return self._pattern.split(content) if self._pattern else content.split(self.text)

    def count(self, content: bytes) -> int:
        if self._pattern:
            return sum(1 for _ in self._pattern.finditer(content))
        return content.count(self.text)

    def end_of_first(self, content: bytes, start: int = 0) -> int:
        """End of the first delimiter that begins at `start` or later, 0 if there is none."""
        if self._pattern:
            match = self._pattern.search(content, start)
            return match.end() if match else 0
        found = content.find(self.text, start)
        return found + len(self.text) if found >= 0 else 0

    def end_of_last(self, content: bytes, start: int) -> int:
        """As `end_of_first` of the last. They are taken from the left: those of several bytes may
        overlap, and documents must not depend on where a block begins."""
        if self.longest == 1:
            return content.rfind(self.text, start) + 1
        last = 0
        while end := self.end_of_first(content, max(start, last)):
            last = end
        return last


@dataclass(frozen=True)
class DelimitedPiece(Piece):
    """Attributes: delimiter ends every document but the last; first is the number, from 1, of the
    first; field is that of a JSON object's text, None of plain text; too_long, that the first
    document exceeds the limit and is not in `content`."""

    path: Path
    content: bytes
    delimiter: Delimiter
    first: int
    field: str | None
    too_long: bool = False

    def documents(self, rules: Rules, skipped: Skipped) -> Iterator[Document]:
        if self.too_long:
            skipped.add("too long", f"{self.source}#{self.first}")
            return
        parse = self._plain if self.field is None else self._json
        contents = self.delimiter.split(self.content)
        if not contents[-1]:
            contents.pop()  # behind the last delimiter there is no document
        for number, raw in enumerate(contents, self.first):
            id_ = f"{self.source}#{number}"
            if len(raw) > rules.max_document_bytes:
                skipped.add("too long", id_)
                continue
            if not raw.strip():
                if self.field is None:
                    skipped.add("empty", id_)
                continue
            text, problem = parse(raw, "utf-8-sig" if number == 1 else "utf-8")
            if problem:
                what = "line" if self.field is not None else "document"
                message = f"--input: {self.path}, {what} {number}: {problem}"
                self.invalid(rules, skipped, id_, message)
            else:
                yield Document(id_, text)

    def _plain(self, raw: bytes, encoding: str) -> tuple[str, str | None]:
        try:
            return raw.decode(encoding).replace("\r\n", "\n"), None
        except UnicodeError as error:
            return "", f"it is not UTF-8 text ({error}); convert it, leave it out"

    def _json(self, raw: bytes, encoding: str) -> tuple[str, str | None]:
        try:
            value = json.loads(raw.decode(encoding))
            problem = _problem(value, self.field)
        except (ValueError, RecursionError) as error:
            value, problem = None, f"it is not JSON in UTF-8 ({error})"
        if problem:
            return "", f"{problem}; {_advice(value, self.field)}correct the line, remove it"
        return value[self.field], None


def _advice(value: object, field: str) -> str:
    """Which field of a JSON object is meant, if it may be another."""
    fields = value if isinstance(value, dict) else {}
    texts = {name: len(text) for name, text in fields.items() if isinstance(text, str)}
    if field in texts or not texts:
        return f'each line must be a JSON object with a string field "{field}"; '
    longest = max(texts, key=texts.get)
    return f"name the field with the text (--text {longest}, or `text:` of the source), "


def _problem(value: object, field: str) -> str | None:
    if not isinstance(value, dict):
        return f"it is a JSON {type(value).__name__}, not an object"
    if field not in value:
        return f'the field "{field}" is missing (it has: {", ".join(list(value)[:8])})'
    if not isinstance(value[field], str):
        return f'the field "{field}" is a {type(value[field]).__name__}'
    try:
        value[field].encode()
    except UnicodeEncodeError:
        return f'the field "{field}" holds half of a surrogate pair'
    return None


class DelimitedFile(Reader):
    """Args: field and delimiter as those of `DelimitedPiece`."""

    def __init__(
        self, id_: str, path: Path, field: str | None, delimiter: Delimiter = Delimiter(b"\n")
    ) -> None:
        self.id, self.path, self.field, self.delimiter = id_, path, field, delimiter
        identity, self.stored_bytes = file_identity(id_, path)
        self.identity = f"{identity} {field} {delimiter.text!r}"

    def pieces(self, position: Position | None, rules: Rules) -> Iterator[Piece]:
        place = position or {"byte": 0, "document": 1}
        offset, first = place["byte"], place["document"]
        if not self.stored_bytes and self.path.suffix in COMPRESSIONS:
            raise unreadable(self.path, OSError(0, "empty, which no compressed file is"))
        try:
            with _opened(self.path, offset) as (file, tell):
                for content, end, too_long in self._blocks(file, rules.max_document_bytes):
                    number = 1 if too_long else self.delimiter.count(content)
                    offset, here = offset + end, first
                    first += number
                    after = {"byte": offset, "document": first}
                    args = (self.path, content, self.delimiter, here, self.field, too_long)
                    yield DelimitedPiece(self.id, len(content), after, tell(), *args)
            self.undivided = self.field is None and first == 1 and offset > 0
        except OSError as error:
            raise unreadable(self.path, error) from None

    def _blocks(self, file: BinaryIO, limit: int) -> Iterator[tuple[bytes, int, bool]]:
        """Whole documents of about `PIECE_BYTES`, their bytes in the file, False; or an empty block
        and the bytes of a document above the limit, True. Holds no more than the limit."""
        rest, dropped = b"", 0
        while chunk := file.read(PIECE_BYTES):
            searched = max(0, len(rest) - self.delimiter.longest)
            rest += chunk
            if dropped:
                found = self.delimiter.end_of_first(rest)
                # What remains may hold the beginning of a delimiter.
                end = found or max(0, len(rest) - self.delimiter.longest + 1)
                dropped += end
                rest = rest[end:]
                if not found:
                    continue
                yield b"", dropped, True
                dropped, searched = 0, 0
            if end := self.delimiter.end_of_last(rest, searched):
                yield rest[:end], end, False
                rest = rest[end:]
            elif len(rest) > limit + self.delimiter.longest:
                dropped = len(rest) - self.delimiter.longest + 1
                rest = rest[dropped:]
        if dropped:
            yield b"", dropped + len(rest), True
        elif rest:
            yield rest, len(rest), False


@contextlib.contextmanager
def _opened(path: Path, offset: int) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A file from a byte of its contents on, and a function that says how much of it, as stored,
    has been read."""
    compression = COMPRESSIONS.get(path.suffix)
    if compression is None:
        with path.open("rb") as file:
            file.seek(offset)
            yield file, file.tell
        return
    import pyarrow

    with pyarrow.OSFile(str(path), "rb") as stored:
        with pyarrow.CompressedInputStream(stored, compression) as file:
            while offset:
                offset -= len(file.read(min(offset, PIECE_BYTES)))
            yield file, stored.tell
