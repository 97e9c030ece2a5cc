"""Verb `corpus`: documents into a training and a held-out file."""

import hashlib
import json
import sysconfig
from collections import Counter
from pathlib import Path

from data_prep.documents import Document, list_sources, read_documents, report_skipped
from data_prep.files import staged
from est_ds.errors import UserError

_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


def gather(inputs: list[Path] | None, out: str, held_out: float) -> None:
    """Writes `OUT.train.jsonl` and `OUT.valid.jsonl`: {"id", "text"} a line, sorted by id.

    Args:
        inputs: Files and folders; None for the sources of the running interpreter's
            standard library.
        out: Prefix of both files.
        held_out: Expected fraction of documents in the held-out file, between 0 and 1.

    Raises:
        UserError: Wrong input, or one of the two files would be empty.
    """
    if not 0 < held_out < 1:
        raise UserError(
            f"--held-out={held_out} is not allowed; use a fraction between 0 and 1, such as 0.02."
        )
    if inputs is None:
        sources = list_sources([Path(sysconfig.get_path("stdlib"))], _NOT_STDLIB)
        sources = [source for source in sources if source.path.suffix == ".py"]
    else:
        sources = list_sources(inputs)
    skipped, counts, sizes = Counter(), Counter(), Counter()
    names = ("train", "valid")
    targets = [Path(f"{out}.{name}.jsonl") for name in names]
    with staged(*targets) as temporary:
        with temporary[0].open("wb") as train, temporary[1].open("wb") as valid:
            files = {"train": train, "valid": valid}
            for document in read_documents(sources, skipped):
                name = "valid" if _is_held_out(document, held_out) else "train"
                record = {"id": document.id, "text": document.text}
                files[name].write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                counts[name] += 1
                sizes[name] += len(document.text.encode())
        for name in names:
            if not counts[name]:
                raise UserError(
                    f"--held-out={held_out} of {counts.total()} documents leaves "
                    f"{out}.{name}.jsonl empty; give more documents or another --held-out."
                )
    for name, target in zip(names, targets, strict=True):
        print(f"{target}: {counts[name]:,} documents, {sizes[name]:,} bytes of text")
    report_skipped(skipped)


def _is_held_out(document: Document, fraction: float) -> bool:
    """A function of the text alone: order, other documents and copies make no difference.

    Identical texts fall on the same side, so no copy of a training document is held out.
    """
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
