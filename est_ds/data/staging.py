"""Corpora and tokenizers of a bucket, copied to this machine: once, whole, and by their hashes.

They lie in the folder `EST_DS_CACHE` (else `est_ds` in the user's folder of caches) under what
names their contents, and stay there. The first process that needs a corpus fetches it; others of
the machine wait. A killed one leaves what it has, and the next goes on from there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

from est_ds.config.corpora import Data
from est_ds.config.kinds import is_url
from est_ds.data.manifest import Manifest, manifest_path, read_manifest
from est_ds.data.remote import Remote, RemoteError, persistent
from est_ds.disk import File, hold, replace_text
from est_ds.errors import UserError, gigabytes
from est_ds.ranks import preempt
from est_ds.ranks.world import World

CACHE = "EST_DS_CACHE"
TRIES = 8  # in a row of a file that cannot be read on: about two minutes
SAY_EVERY_S, LOOK_EVERY_S = 10.0, 0.5
SLOW_BYTES_PER_S = 20e6  # of a node that others wait for


def cache_folder() -> Path:
    """Where what is staged lies."""
    if own := os.environ.get(CACHE):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "est_ds"


def staged_corpus(prefix: str) -> str:
    """The prefix of a corpus on this machine, which is fetched if it is not there; of a local one
    its own.

    Raises:
        UserError: it cannot be fetched, is not what its manifest says, or has none.
    """
    return _staged_corpus(prefix, cache_folder()) if is_url(prefix) else prefix


def is_staged(prefix: str, manifest: Manifest) -> bool:
    """Whether a corpus of a bucket is on this machine."""
    return _is_whole(_place(prefix, manifest, cache_folder()), manifest)


def fetching_s(data: Data) -> float:
    """How much later than others a node may start, since it has corpora to fetch."""
    prefixes = [*(part.corpus for part in data.parts), *data.held_out.values()]
    manifests = [read_manifest(prefix) for prefix in prefixes if is_url(prefix)]
    files = [file for manifest in manifests if manifest for file in _files("", manifest).values()]
    return sum(file.bytes for file in files) / SLOW_BYTES_PER_S


@cache
def _staged_corpus(url: str, folder: Path) -> str:
    manifest = read_manifest(url)
    if manifest is None:
        raise UserError(
            f"corpus {url}: {url}.manifest.json does not exist, and a corpus of a bucket is "
            f"fetched by it; put the manifest beside the .bin and .idx, or correct the name."
        )
    place = _place(url, manifest, folder)
    try:
        if not _is_whole(place, manifest):
            with _only_one(place.parent):
                if not _is_whole(place, manifest):
                    _fetch(url, manifest, place)
    except RemoteError as e:
        raise UserError(
            f"corpus {url}: {e}; see that it is whole and that this machine may read it, and start "
            f"again: what is here already is not fetched anew."
        ) from None
    except OSError as e:
        raise UserError(
            f"corpus {url} cannot be copied to {place.parent} ({e.strerror or e}); mend that, or "
            f"name another folder in {CACHE}."
        ) from None
    return str(place)


def _place(url: str, manifest: Manifest, folder: Path) -> Path:
    return folder / "corpora" / manifest.fingerprint / url.rpartition("/")[2]


def _files(name: str, manifest: Manifest) -> dict[str, File]:
    """Files of a corpus but its manifest, which is written last."""
    found = {}
    for shard in manifest.shards:
        stem = name + shard.suffix
        found[f"{stem}.bin"] = File(bytes=shard.bin_bytes, sha256=shard.bin_sha256)
        found[f"{stem}.idx"] = File(bytes=shard.idx_bytes, sha256=shard.idx_sha256)
    return found


def _is_whole(place: Path, manifest: Manifest) -> bool:
    files = _files(place.name, manifest)
    return manifest_path(str(place)).is_file() and all(
        _has_size(place.parent / name, file) for name, file in files.items()
    )


def _has_size(file: Path, expected: File) -> bool:
    return file.is_file() and file.stat().st_size == expected.bytes


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Waits until no other process of this machine fetches into a folder."""
    while True:
        try:
            lock = hold(folder / ".lock")
            break
        except BlockingIOError:
            _heed_notice()
            time.sleep(LOOK_EVERY_S)
    with lock:
        yield


def _fetch(url: str, manifest: Manifest, place: Path) -> None:
    remote = Remote(url.rpartition("/")[0], f"corpus {url}")
    files = _files(place.name, manifest)
    total = sum(file.bytes for file in files.values())
    left = total - sum(file.stat().st_size for file in place.parent.iterdir())
    free = shutil.disk_usage(place.parent).free
    if left > free:
        raise OSError(f"it takes {gigabytes(left)} more, and {gigabytes(free)} are free there")
    says = _Says(url, total)
    done = 0
    for name, expected in files.items():
        file = place.parent / name
        if not _has_size(file, expected):
            goes_on = partial(says, done)
            persistent(partial(remote.fetch, name, file, expected, goes_on), TRIES)
        done += expected.bytes
    replace_text(manifest_path(str(place)), manifest.model_dump_json(indent=1) + "\n")
    says(0, total, last=True)


class _Says:
    """Says from time to time how much of a corpus is here."""

    def __init__(self, url: str, total: int) -> None:
        self._url, self._total, self._said = url, total, time.monotonic()

    def __call__(self, before: int, here: int, last: bool = False) -> None:
        _heed_notice()
        now = time.monotonic()
        if now - self._said > SAY_EVERY_S or last:
            self._said = now
            text = f"{self._url}: {gigabytes(before + here)} of {gigabytes(self._total)} are here"
            print(text, file=sys.stderr, flush=True)


def _heed_notice() -> None:
    """Ends the process after a notice of pre-emption: nothing is to be saved."""
    if preempt.received():
        is_speaker = World.from_environment().local_rank == 0
        preempt.end("pre-empted before the first step" if is_speaker else None)


def staged_folder(url: str, names: Iterable[str]) -> Path:
    """A copy on this machine of the small files of a folder in a bucket.

    Args:
        url: of the folder, or of one of the files.
        names: of the files; those that are not there are left out.

    Raises:
        UserError: it cannot be fetched, or holds none of them.
    """
    return _staged_folder(url, tuple(names), cache_folder())


@cache
def _staged_folder(url: str, names: tuple[str, ...], folder: Path) -> Path:
    above, _, last = url.rpartition("/")
    asked = f"data.tokenizer={url!r}"
    remote = Remote(above if last in names else url, asked)
    try:
        there = persistent(remote.sizes)
        contents = {n: persistent(partial(remote.read, n)) for n in names if n in there}
    except RemoteError as e:
        raise UserError(
            f"{asked}: {e}; see that the name is right and that this machine may read it, or give "
            f"a local folder."
        ) from None
    if not contents:
        raise UserError(
            f"{asked} holds no file of a tokenizer, or is not there; correct the name, or give a "
            f"local folder."
        )
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    place = folder / "tokenizers" / digest.hexdigest()[:16]
    try:
        _write_folder(place, contents)
    except OSError as e:
        raise UserError(
            f"{asked} cannot be copied to {place} ({e.strerror or e}); mend that, or name another "
            f"folder in {CACHE}."
        ) from None
    return place / last if last in names else place


def _write_folder(place: Path, contents: dict[str, bytes]) -> None:
    """Writes a folder whole or not at all; others may do so at the same time."""
    if place.is_dir():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = Path(mkdtemp(prefix=".", dir=place.parent))
    for name, content in contents.items():
        (partial_folder / name).write_bytes(content)
    try:
        os.rename(partial_folder, place)
    except OSError:
        shutil.rmtree(partial_folder)
        if not place.is_dir():
            raise
