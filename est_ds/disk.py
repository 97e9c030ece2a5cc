"""Files that are on disk, whole, when a call returns; and one that one process may hold."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

from pydantic import BaseModel, ConfigDict, Field

from est_ds.errors import naming

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def hold(file: Path) -> TextIO:
    """Holds a file, made with its folder, until it is closed or the process ends.

    On a shared file system without locks nothing is guarded.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in NO_LOCKS:
            lock.close()
            raise
    return lock


class File(BaseModel):
    """Size and hash of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


def replace_text(file: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    replace_bytes(file, text.encode())


def replace_bytes(file: Path, content: bytes) -> None:
    """Writes a small file whole or not at all."""
    beside = file.with_name(f".{file.name}.partial")
    with naming(beside), beside.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, file)
    sync_folder(file.parent)


def try_to_write(folder: Path) -> None:
    """Raises OSError if files cannot be written into a folder, which may be yet to be made."""
    while not folder.exists():
        folder = folder.parent
    with naming(folder), TemporaryFile(dir=folder):
        pass


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
