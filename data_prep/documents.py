"""Documents from .txt, .py and .jsonl files, one at a time, in an order that never changes."""

import io
import json
import os
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from est_ds.errors import UserError

SUFFIXES = (".jsonl", ".py", ".txt")


@dataclass(frozen=True)
class Document:
    """Attributes: id is a relative posix path, or path#line for a line of a .jsonl file."""

    id: str
    text: str


@dataclass(frozen=True)
class Source:
    """A file of documents and the id it goes by."""

    id: str
    path: Path


def list_sources(inputs: list[Path], excluded: frozenset[str] = frozenset()) -> list[Source]:
    """Files below the inputs, sorted by id: the path relative to the input it was found in.

    Args:
        inputs: Files, and folders to search. Hidden folders are left out.
        excluded: Names of folders to leave out as well.

    Raises:
        UserError: An input does not exist, has an unknown ending or holds no document
            file, or two files have the same id.
    """
    found: dict[str, Path] = {}
    allowed = ", ".join(SUFFIXES)
    for root in inputs:
        if root.is_dir():
            paths = {path.relative_to(root).as_posix(): path for path in _walk(root, excluded)}
        elif root.is_file() and root.suffix in SUFFIXES:
            paths = {root.name: root}
        elif root.exists():
            raise UserError(
                f"--input {root}: unknown kind of file; give one that ends in {allowed}, or a "
                f"folder."
            )
        else:
            raise UserError(
                f"--input {root} does not exist; give a folder or a file that ends in {allowed}."
            )
        if not paths:
            raise UserError(
                f"--input {root}: no file in this folder ends in {allowed}; give another folder."
            )
        for id_, path in paths.items():
            if id_ in found:
                raise UserError(
                    f"--input: {found[id_]} and {path} would both be called {id_}; "
                    f"give the folder that holds both, or rename one."
                )
            found[id_] = path
    return [Source(id_, found[id_]) for id_ in sorted(found)]


def _walk(root: Path, excluded: frozenset[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [n for n in folders if n not in excluded and not n.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if path.suffix in SUFFIXES and path.is_file():
                yield path


def read_documents(sources: list[Source], skipped: Counter | None = None) -> Iterator[Document]:
    """Documents of the sources in order, one in memory at a time.

    Empty documents, and .py files that do not decode as they declare, are left out and
    counted in `skipped` by reason.

    Raises:
        UserError: A .txt file is not UTF-8, or a line of a .jsonl file is no JSON object
            with a string field "text".
    """
    skipped = Counter() if skipped is None else skipped
    for source in sources:
        for document in _read(source, skipped):
            if document.text.strip():
                yield document
            else:
                skipped["empty"] += 1


def report_skipped(skipped: Counter) -> None:
    """Prints how many documents were left out, and why; nothing if none were."""
    if skipped:
        reasons = (f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
        print(f"left out: {', '.join(reasons)}")


def _read(source: Source, skipped: Counter) -> Iterator[Document]:
    if source.path.suffix == ".jsonl":
        yield from _read_jsonl(source)
        return
    content = source.path.read_bytes()
    try:
        encoding = "utf-8-sig"
        if source.path.suffix == ".py":
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = content.decode(encoding)
        text.encode()  # some declared encodings yield surrogates, which no file can hold
    except (UnicodeError, SyntaxError, LookupError) as error:
        if source.path.suffix == ".py":
            skipped["undecodable"] += 1
            return
        raise UserError(
            f"--input: {source.path} is not UTF-8 text ({error}); convert it or leave it out."
        ) from None
    yield Document(source.id, text.replace("\r\n", "\n"))


def _read_jsonl(source: Source) -> Iterator[Document]:
    with source.path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                problem = _problem(value)
            except (ValueError, RecursionError) as error:
                problem = f"it is not JSON in UTF-8 ({error})"
            if problem:
                raise UserError(
                    f"--input: {source.path}, line {number}: {problem}; each line must be a JSON "
                    f'object with a string field "text"; correct the line or remove it.'
                )
            yield Document(f"{source.id}#{number}", value["text"])


def _problem(value: object) -> str | None:
    if not isinstance(value, dict):
        return f"it is a JSON {type(value).__name__}, not an object"
    if "text" not in value:
        return 'the field "text" is missing'
    if not isinstance(value["text"], str):
        return f'the field "text" is a {type(value["text"]).__name__}'
    try:
        value["text"].encode()
    except UnicodeEncodeError:
        return 'the field "text" holds half of a surrogate pair'
    return None
