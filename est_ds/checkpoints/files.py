"""Files that are on disk, whole, when a call returns."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from est_ds.checkpoints.index import File
from est_ds.errors import naming


def replace_text(file: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    beside = file.with_name(f".{file.name}.partial")
    with naming(beside), beside.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, file)
    sync_folder(file.parent)


def describe(file: Path) -> File:
    """Size and hash of a file."""
    with file.open("rb") as f:
        return File(bytes=os.fstat(f.fileno()).st_size, sha256=_sha256(f))


def sync_file(file: Path) -> None:
    """Waits until a file's contents are on disk."""
    with file.open("rb+") as f:
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until a folder's names are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(f) -> str:
    return hashlib.file_digest(f, "sha256").hexdigest()
