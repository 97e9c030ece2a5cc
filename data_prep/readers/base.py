"""What readers, pieces and those who use them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from est_ds.errors import UserError

PIECE_BYTES = 1 << 20

Position = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """How far the sources have been read.

    Attributes:
        source: index of the source that is being read.
        position: in that source; None: at its beginning.
        bytes_read: stored bytes of it up to there, about.
    """

    source: int = 0
    position: Position | None = None
    bytes_read: int = 0


@dataclass(frozen=True)
class Document:
    """Attributes: id is the source's, with #line or #row where the source holds several."""

    id: str
    text: str


@dataclass(frozen=True)
class Rules:
    """What becomes of documents that are too long or cannot be read; see `Preparation`."""

    max_document_bytes: int = 1 << 26
    invalid: str = "error"


@dataclass
class Skipped:
    """Documents left out, by reason, with the first of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, document: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, document)

    def update(self, later: Skipped) -> None:
        self.counts.update(later.counts)
        self.first = later.first | self.first

    def report(self) -> None:
        """Prints how many documents were left out and why; nothing if none were."""
        if self.counts:
            print(f"left out: {self._reasons()}")

    def nothing_left(self) -> UserError:
        """What to say where no document came through."""
        if not self.counts:
            return UserError("--input: no document with text in it; give other files.")
        why = "; without --invalid skip the first invalid one is explained"
        return UserError(
            f"--input: no document is left, all were left out: {self._reasons()}; give other files"
            f"{why if self.counts['invalid'] else ''}."
        )

    def _reasons(self) -> str:
        return "; ".join(
            f"{count:,} {reason} (the first: {self.first[reason]})"
            for reason, count in sorted(self.counts.items())
        )


@dataclass(frozen=True)
class Piece(ABC):
    """A part of a source that another process can parse.

    Attributes:
        source: id of the source.
        size: bytes of text in it, about.
        position: where its reader goes on after it.
        bytes_read: stored bytes of the source up to its end, about; for the progress bar.
    """

    source: str
    size: int
    position: Position
    bytes_read: int

    @abstractmethod
    def documents(self, rules: Rules, skipped: Skipped) -> Iterator[Document]:
        """Its documents in order; those left out are counted.

        Raises:
            UserError: One cannot be read, and the rules do not allow that.
        """

    def invalid(self, rules: Rules, skipped: Skipped, document: str, message: str) -> None:
        """Counts a document that cannot be read, or refuses it with the message."""
        if rules.invalid != "skip":
            raise UserError(f"{message}, or have such documents left out with --invalid skip.")
        skipped.add("invalid", document)


class Reader(ABC):
    """A source, open or not.

    Attributes:
        id: its name in messages and documents.
        identity: changes when its contents do, as far as that can be seen without reading it.
        stored_bytes: what `Piece.bytes_read` ends at; None if it is not known.
        undivided: whether it was read to its end, and the separator not found in it.
    """

    id: str
    identity: str
    stored_bytes: int | None
    undivided: bool = False

    @abstractmethod
    def pieces(self, position: Position | None, rules: Rules) -> Iterator[Piece]:
        """The pieces after a position, or all of them.

        Raises:
            UserError: The source cannot be read or is damaged.
        """


def report_undivided(readers: Iterable[Reader]) -> None:
    """Prints in which files the separator was not found; nothing if it was in all."""
    undivided = [reader.id for reader in readers if reader.undivided]
    if undivided:
        more = f" and {len(undivided) - 1:,} more" if len(undivided) > 1 else ""
        print(f"the separator was not found in {undivided[0]}{more}: one document each")


def file_identity(id_: str, path: Path) -> tuple[str, int]:
    """Identity of a file by name, size and time of change; and its size."""
    stat = path.stat()
    return f"{id_} {stat.st_size} {stat.st_mtime_ns}", stat.st_size


def unreadable(path: Path, error: OSError) -> UserError:
    reason = error.strerror or " ".join(str(error).split())
    return UserError(
        f"--input: {path} cannot be read ({reason}); correct that, copy it again, or leave it out."
    )
