"""Text files that are one document each: .txt and .py."""

from __future__ import annotations

import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.readers.base import (
    Document,
    Piece,
    Position,
    Reader,
    Rules,
    Skipped,
    file_identity,
    unreadable,
)


@dataclass(frozen=True)
class FilePiece(Piece):
    """A whole file, which the process that parses it reads."""

    path: Path

    def documents(self, rules: Rules, skipped: Skipped) -> Iterator[Document]:
        if self.size > rules.max_document_bytes:
            skipped.add("too long", self.source)
            return
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise unreadable(self.path, error) from None
        try:
            encoding = "utf-8-sig"
            if self.path.suffix == ".py":
                encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            text = content.decode(encoding)
            text.encode()  # some declared encodings yield surrogates, which no file can hold
        except (UnicodeError, SyntaxError, LookupError) as error:
            if self.path.suffix == ".py":
                skipped.add("undecodable", self.source)
                return
            message = f"--input: {self.path} is not UTF-8 text ({error}); convert it, leave it out"
            self.invalid(rules, skipped, self.source, message)
            return
        yield Document(self.source, text.replace("\r\n", "\n"))


class TextFile(Reader):
    def __init__(self, id_: str, path: Path) -> None:
        self.id, self.path = id_, path
        self.identity, self.stored_bytes = file_identity(id_, path)

    def pieces(self, position: Position | None, rules: Rules) -> Iterator[Piece]:
        if position is None:
            size = self.stored_bytes
            yield FilePiece(self.id, size, {"read": True}, size, self.path)
