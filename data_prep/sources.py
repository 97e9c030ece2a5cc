"""From what the user named to readers, in an order that never changes."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_prep.config import SourceConfig
from data_prep.readers.base import (
    Document,
    Reader,
    Rules,
    Skipped,
    report_undivided,
    unreadable,
)
from data_prep.readers.delimited import COMPRESSIONS, DelimitedFile, Delimiter
from data_prep.readers.rows import HubDataset, ParquetFile
from data_prep.readers.text import TextFile
from est_ds.errors import UserError

JSONL = (".jsonl", *(f".jsonl{ending}" for ending in COMPRESSIONS))
SUFFIXES = (".txt", ".py", *JSONL, ".parquet")
_WITH_FIELDS = (*JSONL, ".parquet")


def open_sources(sources: Iterable[SourceConfig]) -> list[Reader]:
    """The readers of all sources: source by source, and the files of one by their names.

    A file goes by its path relative to the folder it was found in, or to the part of a glob
    before the first wildcard; by its whole path if that would give two the same name.

    Raises:
        UserError: a source does not exist, is of no known kind or holds no document file, or a
            file is given twice.
    """
    found = [
        (source, sorted(_files(source))) if source.paths else (source, None) for source in sources
    ]
    names = Counter(name for _, files in found for name, _ in files or ())
    _check_once([path for _, files in found for _, path in files or ()])
    readers: list[Reader] = []
    for source, files in found:
        if files is None:
            readers.append(HubDataset(source))
            continue
        _check_settings(source, [path for _, path in files])
        for name, path in files:
            readers.append(_reader(source, name if names[name] == 1 else path.as_posix(), path))
    return readers


def read_documents(readers: Sequence[Reader], rules: Rules, skipped: Skipped) -> Iterator[Document]:
    """Documents with text in them, in order, a piece in memory at a time.

    Says at the end in which files the separator was not found.

    Raises:
        UserError: One cannot be read, and the rules do not allow that.
    """
    for reader in readers:
        for piece in reader.pieces(None, rules):
            for document in piece.documents(rules, skipped):
                if document.text.strip():
                    yield document
                else:
                    skipped.add("empty", document.id)
    report_undivided(readers)


def _reader(source: SourceConfig, name: str, path: Path) -> Reader:
    try:
        if path.name.endswith(JSONL):
            return DelimitedFile(name, path, source.text)
        if path.suffix == ".parquet":
            return ParquetFile(name, path, source.text)
        if source.separator and path.name.endswith((".txt", *source.plain)):
            delimiter = Delimiter(source.separator.encode(), any_line_end=True)
            return DelimitedFile(name, path, None, delimiter)
        return TextFile(name, path)
    except OSError as error:
        raise unreadable(path, error) from None


def _files(source: SourceConfig) -> list[tuple[str, Path]]:
    """Names and paths of the files of a source."""
    files = []
    endings = (*SUFFIXES, *source.plain)
    for given in source.paths:
        path = Path(given)
        if path.is_dir():
            found = _in_folder(path, endings)
        elif glob.has_magic(given) and not path.exists():
            found = _matching(given, endings)
        elif path.is_file() and path.name.endswith(endings):
            found = [(path.name, path)]
        elif path.exists():
            raise UserError(
                f"--input {given}: unknown kind of file; give one that ends in "
                f"{', '.join(endings)}, or a folder{_as_text(path)}."
            )
        else:
            raise UserError(
                f"--input {given} does not exist; give a folder, a glob or a file that ends in "
                f"{', '.join(endings)}."
            )
        files += found
    return files


def _as_text(path: Path) -> str:
    """How a file of no known kind is read all the same."""
    return f"; --plain {path.suffix} reads it as text" if path.suffix and path.is_file() else ""


def _in_folder(root: Path, endings: tuple[str, ...]) -> list[tuple[str, Path]]:
    paths = list(walk(root))
    chosen = [path for path in paths if path.name.endswith(endings)]
    if not chosen:
        also = _as_text(paths[0]) if paths else ""
        raise UserError(
            f"--input {root}: no file in this folder ends in {', '.join(endings)}; give another "
            f"folder{also}."
        )
    if len(chosen) < len(paths):
        others = Counter(p.suffix or p.name for p in paths if not p.name.endswith(endings))
        shown = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(5))
        print(
            f"{root}: {len(paths) - len(chosen):,} files of other kinds are not read ({shown}); "
            f"--plain ENDING reads those of an ending as text"
        )
    return [(path.relative_to(root).as_posix(), path) for path in chosen]


def _matching(pattern: str, endings: tuple[str, ...]) -> list[tuple[str, Path]]:
    parts = Path(pattern).parts
    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:plain])
    paths = [Path(p) for p in glob.glob(pattern, recursive=True) if not os.path.isdir(p)]
    if not paths:
        raise UserError(f"--input {pattern}: no file matches; correct the pattern.")
    for path in paths:
        if not path.name.endswith(endings):
            raise UserError(
                f"--input {pattern}: matches {path}, an unknown kind of file; match only those "
                f"that end in {', '.join(endings)}{_as_text(path)}."
            )
    return [(path.relative_to(root).as_posix(), path) for path in paths]


def walk(root: Path, excluded: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Paths of files below a folder, but not in hidden folders or those of an excluded name. Links
    are followed, after the folders that are no links, and each folder is entered once."""

    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename), error)

    entered: set[str] = set()
    waiting = [str(root)]  # the root, then links, in the order in which they were found
    for start in waiting:
        for folder, folders, files in os.walk(start, onerror=refuse):
            real = os.path.realpath(folder)
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            folders[:] = sorted(n for n in folders if n not in excluded and n[0] != ".")
            waiting += [path for n in folders if os.path.islink(path := os.path.join(folder, n))]
            yield from (Path(folder, name) for name in sorted(files))


def _check_once(paths: list[Path]) -> None:
    """Refuses what would be read twice, or not at all."""
    seen: dict[str, Path] = {}
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"--input: the name of the file {os.fsencode(path)!r} is not UTF-8; rename it."
            ) from None
        if not path.is_file():
            kind = "a broken link" if path.is_symlink() else "no regular file"
            raise UserError(f"--input: {path} is {kind}; correct it or remove it.")
        if not os.access(path, os.R_OK):
            raise unreadable(path, PermissionError(0, "no permission to read it"))
        former = seen.setdefault(os.path.realpath(path), path)
        if former is not path:
            raise UserError(f"--input: {path} is given twice (also as {former}); give it once.")


def _check_settings(source: SourceConfig, paths: list[Path]) -> None:
    """Refuses settings that no file of the source takes up."""
    of = {"text": _WITH_FIELDS, "separator": (".txt", *source.plain), "plain": source.plain}
    for field, endings in of.items():
        if field in source.model_fields_set and not any(p.name.endswith(endings) for p in paths):
            raise UserError(
                f"--input {' '.join(source.paths)}: {field}={getattr(source, field)!r} has no "
                f"effect, for none of the files ends in {', '.join(endings)}; remove it."
            )
