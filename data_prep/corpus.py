"""Verb `corpus`: documents into a training and a held-out file."""

from __future__ import annotations

import json
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.config import SourceConfig
from data_prep.files import staged
from data_prep.readers.base import Reader, Rules, Skipped
from data_prep.readers.text import TextFile
from data_prep.sources import open_sources, read_documents, walk
from data_prep.tokenizing import is_held_out
from est_ds.errors import UserError

_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


def gather(sources: Sequence[SourceConfig] | None, out: str, held_out: float, rules: Rules) -> None:
    """Writes `OUT.train.jsonl` and `OUT.valid.jsonl`: {"id", "text"} a line, in order.

    Args:
        sources: None for the sources of the running interpreter's standard library.
        out: Prefix of both files.
        held_out: Expected fraction of documents in the held-out file, between 0 and 1.

    Raises:
        UserError: Wrong input, or one of the two files would be empty.
    """
    if not 0 < held_out < 1:
        raise UserError(
            f"--held-out={held_out} is not allowed; use a fraction between 0 and 1, such as 0.02."
        )
    readers = _standard_library() if sources is None else open_sources(sources)
    _refuse_own_input(sources or (), out)
    skipped, counts, sizes = Skipped(), Counter(), Counter()
    names = ("train", "valid")
    targets = [Path(f"{out}.{name}.jsonl") for name in names]
    with staged(*targets) as temporary:
        with temporary[0].open("wb") as train, temporary[1].open("wb") as valid:
            files = {"train": train, "valid": valid}
            for document in read_documents(readers, rules, skipped):
                name = "valid" if is_held_out(document.text, held_out) else "train"
                record = {"id": document.id, "text": document.text}
                files[name].write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                counts[name] += 1
                sizes[name] += len(document.text.encode())
        if not counts:
            raise skipped.nothing_left()
        for name in names:
            if not counts[name]:
                raise UserError(
                    f"--held-out={held_out} of {counts.total()} documents leaves "
                    f"{out}.{name}.jsonl empty; give more documents or another --held-out."
                )
    for name, target in zip(names, targets, strict=True):
        print(f"{target}: {counts[name]:,} documents, {sizes[name]:,} bytes of text")
    skipped.report()


def _refuse_own_input(sources: Sequence[SourceConfig], out: str) -> None:
    """A second run would take what the first one wrote for documents."""
    folder = Path(out).resolve().parent
    for given in (path for source in sources for path in source.paths):
        if Path(given).is_dir() and folder.is_relative_to(Path(given).resolve()):
            raise UserError(f"--out {out} lies in the --input {given}; give a place outside.")


def _standard_library() -> list[Reader]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = {
        path.relative_to(root).as_posix(): path
        for path in walk(root, _NOT_STDLIB)
        if path.suffix == ".py" and path.is_file()
    }
    return [TextFile(name, paths[name]) for name in sorted(paths)]
