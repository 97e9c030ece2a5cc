"""Files in a bucket (S3, Google Cloud Storage), or in a folder that stands for one, by fsspec.

Keys, endpoints and profiles are those of the environment and of the cloud's own files, as boto and
google-auth read them. No message holds one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractBufferedFile

from est_ds.disk import File, sync_file
from est_ds.errors import UserError, how_to_install, without_keys

T = TypeVar("T")
PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs")}  # of a scheme, and the extra that has it
BLOCK_BYTES = 16 << 20  # of one request; a process holds a few of them
MOST_PARTS = 9000  # of one object; S3 allows 10,000
AT_ONCE = 4  # requests of one download


class RemoteError(Exception):
    """A bucket does not do what it is asked; the text names no key."""


class RemoteMissing(RemoteError):
    """There is no such file, or no such bucket."""


class RemoteDamaged(RemoteError):
    """A file is not what was written."""


def persistent(work: Callable[[], T], tries: int = 4) -> T:
    """Tries again, after 1, 2, 4, ... s, what a bucket refuses for now."""
    for i in range(tries - 1):
        try:
            return work()
        except (RemoteMissing, RemoteDamaged):
            raise
        except RemoteError:
            time.sleep(2.0**i)
    return work()


def check_installed(url: str, asked: str) -> None:
    """Checks that the package of a URL's scheme is there, without loading it.

    Args:
        asked: what the user gave, as errors say it.

    Raises:
        UserError: it is not.
    """
    package, extra = PACKAGES.get(url.partition("://")[0], (None, None))
    if package and find_spec(package) is None:
        raise UserError(
            f"{asked} needs the package {package}, which is not installed; install it "
            f"({how_to_install(extra)}), or give a local path."
        )


class Remote:
    """A folder in a bucket. Whatever fails raises `RemoteError`; names are relative to it.

    Args:
        url: `s3://BUCKET/FOLDER`, `gs://...` or `file:///FOLDER`.
        asked: what the user gave, as errors say it.

    Raises:
        UserError: the package of the scheme is not installed.
    """

    def __init__(self, url: str, asked: str) -> None:
        check_installed(url, asked)
        self.url, scheme = url, url.partition("://")[0]
        options = {}
        if scheme in PACKAGES:
            options["use_listings_cache"] = False
            # What it logs besides what it raises may hold keys.
            logging.getLogger(PACKAGES[scheme][0]).setLevel(logging.CRITICAL)
        self._files = fsspec.filesystem(scheme, **options)
        self._folder = self._files._strip_protocol(url).rstrip("/")

    def read(self, name: str) -> bytes:
        """The contents of a small file."""
        with self._telling(f"read {name}"):
            return self._files.cat_file(self._path(name))

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file in one request."""
        with self._telling(f"write {name}"):
            self._make_folder(name)
            self._files.pipe_file(self._path(name), content)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of what lies in a folder, by name, folders among them; none if there is none."""
        with self._telling(f"list {folder or 'it'}"):
            try:
                found = self._files.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
            own = self._path(folder)
            entries = {e["name"].rstrip("/"): e.get("size") or 0 for e in found}
            return {name.rpartition("/")[2]: n for name, n in entries.items() if name != own}

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with self._telling(f"remove {name}"):
            try:
                self._files.rm_file(self._path(name))
            except FileNotFoundError:
                pass

    def remove_folder(self, folder: str) -> None:
        """Removes a folder with its files."""
        for name in self.sizes(folder):
            self.remove(f"{folder}/{name}")
        if not isinstance(self._files, AsyncFileSystem):  # else there are none
            with self._telling(f"remove {folder}"):
                self._files.rmdir(self._path(folder))

    def send(self, file: Path, name: str, goes_on: Callable[[], None]) -> File:
        """Copies a file there, in blocks; returns what was sent.

        Args:
            goes_on: called before every block; what it raises ends the copy, and nothing of it is
                left.

        Raises:
            RemoteError: the bucket does not take it.
            OSError: the file cannot be read.
        """
        size = file.stat().st_size
        block = max(BLOCK_BYTES, -(-size // MOST_PARTS))
        digest, sent = hashlib.sha256(), 0
        with file.open("rb") as source:
            with self._telling(f"write {name}"):
                self._make_folder(name)
                there = self._files.open(self._path(name), "wb", block_size=block)
            try:
                while content := source.read(block):
                    goes_on()
                    digest.update(content)
                    sent += len(content)
                    with self._telling(f"write {name}"):
                        there.write(content)
                with self._telling(f"write {name}"):
                    there.close()
            except BaseException:
                _give_up(there)
                raise
        return File(bytes=sent, sha256=digest.hexdigest())

    def fetch(self, name: str, file: Path, expected: File, goes_on: Callable[[int], None]) -> None:
        """Copies a file from there, and goes on with what an interrupted call left.

        Args:
            expected: what it must be.
            goes_on: called with the bytes that are here, before every few blocks.

        Raises:
            RemoteError: it cannot be read, or is not what was expected.
            OSError: the file cannot be written.
        """
        partial = file.with_name(f".{file.name}.partial")
        digest = hashlib.sha256()
        with partial.open("a+b") as target:
            have = os.fstat(target.fileno()).st_size
            if have > expected.bytes:
                target.truncate(0)
            target.seek(0)
            have = 0
            while content := target.read(BLOCK_BYTES):
                digest.update(content)
                have += len(content)
            while have < expected.bytes:
                goes_on(have)
                blocks = self._blocks(name, have, expected.bytes)
                for content in blocks:
                    digest.update(content)
                    target.write(content)
                have += sum(map(len, blocks))
        if digest.hexdigest() != expected.sha256:
            partial.unlink()
            raise RemoteDamaged(f"{self.url}/{name} is not what was written (its sha256 differs)")
        sync_file(partial)
        os.replace(partial, file)

    def _blocks(self, name: str, start: int, end: int) -> list[bytes]:
        """The next blocks of a file, in order."""
        starts = list(range(start, end, BLOCK_BYTES))[:AT_ONCE]
        ends = [min(s + BLOCK_BYTES, end) for s in starts]
        with self._telling(f"read {name}"):
            path = self._path(name)
            found = self._files.cat_ranges([path] * len(starts), starts, ends, on_error="raise")
        for content, first, last in zip(found, starts, ends):
            if len(content) != last - first:
                raise RemoteDamaged(
                    f"{self.url}/{name} has {first + len(content)} bytes, not {end}"
                )
        return found

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}".rstrip("/")

    def _make_folder(self, name: str) -> None:
        if not isinstance(self._files, AsyncFileSystem):
            self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    @contextmanager
    def _telling(self, doing: str) -> Iterator[None]:
        """Turns whatever the libraries raise into a `RemoteError`."""
        try:
            yield
        except Exception as e:
            kind = RemoteMissing if isinstance(e, FileNotFoundError) else RemoteError
            said = without_keys(str(e)) or "no more is said"
            raise kind(f"{self.url}: could not {doing} ({type(e).__name__}: {said})") from None


def _give_up(there: Any) -> None:
    """Leaves a file of a bucket unwritten: to close it would make what was sent a whole one."""
    if not isinstance(there, AbstractBufferedFile):
        there.close()
        return
    with suppress(Exception):  # the bucket does not answer; it has no whole file in any case
        there.discard()
    there.closed = True
