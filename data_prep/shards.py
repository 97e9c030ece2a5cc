"""The shards of one corpus while they are written, so that any moment can be the last one."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.tokenizing import Packed
from est_ds.data.header import write_index
from est_ds.data.manifest import Shard
from est_ds.data.tokenizer import file_sha256

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Format:
    """How tokens are written.

    Attributes:
        type_code: number of `dtype` in an index.
        shard_tokens: a shard ends with the document that reaches this number.
    """

    dtype: np.dtype
    type_code: int
    shard_tokens: int


@dataclass
class _Unfinished:
    """The shard that is being written: its files, the hash and the sizes of what is in them."""

    bin: Any
    lengths: Any
    sha256: Any
    num_tokens: int
    num_documents: int


class ShardWriter:
    """Appends documents to `FOLDER/NAME-00000.bin`, `-00001.bin`, ...

    The lengths of a shard's documents stand in a file beside it until its index is written from
    them. What was committed survives the death of the process; what came after it is cut off
    again by the next one.

    Args:
        state: what `commit` returned, or `NOTHING`; with it `counts`, how often every token occurs
            in what was committed, int64 [vocabulary].
    """

    NOTHING = {"finished": [], "tokens": 0, "documents": 0, "text_bytes": 0}

    def __init__(self, folder: Path, name: str, form: Format, state: dict[str, Any]) -> None:
        self._folder, self._name, self._form = folder, name, form
        self.counts = state["counts"]
        self.finished = [Shard(**shard) for shard in state["finished"]]
        self.text_bytes = state["text_bytes"]
        self._open: _Unfinished | None = None
        if state["tokens"]:
            self._open = self._reopened(state["tokens"], state["documents"])

    @property
    def num_tokens(self) -> int:
        open_tokens = self._open.num_tokens if self._open else 0
        return open_tokens + sum(shard.num_tokens for shard in self.finished)

    @property
    def num_documents(self) -> int:
        open_documents = self._open.num_documents if self._open else 0
        return open_documents + sum(shard.num_documents for shard in self.finished)

    def path(self, number: int, ending: str) -> Path:
        return self._folder / f"{self._name}-{number:05d}.{ending}"

    def add(self, packed: Packed) -> None:
        """Appends documents; a shard ends with the document that reaches `shard_tokens`."""
        ends = np.cumsum(packed.lengths, dtype=np.int64)
        first, begin = 0, 0
        while first < len(ends):
            shard = self._open = self._open or self._new()
            room = self._form.shard_tokens - shard.num_tokens
            last = min(int(np.searchsorted(ends, begin + room)) + 1, len(ends))
            end = int(ends[last - 1])
            content = memoryview(packed.tokens[begin:end]).cast("B")
            _write(shard.bin, content)
            _write(shard.lengths, memoryview(packed.lengths[first:last]).cast("B"))
            shard.sha256.update(content)
            shard.num_tokens += end - begin
            shard.num_documents += last - first
            if shard.num_tokens >= self._form.shard_tokens:
                self.finish()
            first, begin = last, end
        self.counts += packed.counts
        self.text_bytes += packed.text_bytes

    def commit(self) -> dict[str, Any]:
        """Makes everything so far last, and returns the state that continues from here."""
        if self._open:
            for file in (self._open.bin, self._open.lengths):
                os.fsync(file)
        return {
            "finished": [shard.model_dump() for shard in self.finished],
            "tokens": self._open.num_tokens if self._open else 0,
            "documents": self._open.num_documents if self._open else 0,
            "text_bytes": self.text_bytes,
        }

    def finish(self) -> None:
        """Writes the index of the shard that is open, if one is, and closes it."""
        if self._open is None:
            return
        shard, number = self._open, len(self.finished)
        bin_, idx = self.path(number, "bin"), self.path(number, "idx")
        for file in (shard.bin, shard.lengths):
            os.fsync(file)
        self.close()
        lengths = np.fromfile(self.path(number, "lengths"), np.int32)
        write_index(idx, self._form.dtype, self._form.type_code, lengths)
        with idx.open("rb") as file:
            os.fsync(file)
        self.finished.append(
            Shard(
                suffix=f"-{number:05d}",
                num_tokens=shard.num_tokens,
                num_documents=shard.num_documents,
                bin_bytes=bin_.stat().st_size,
                idx_bytes=idx.stat().st_size,
                bin_sha256=shard.sha256.hexdigest(),
                idx_sha256=file_sha256(idx),
            )
        )

    def close(self) -> None:
        if self._open is not None:
            self._open.bin.close()
            self._open.lengths.close()
            self._open = None

    def _new(self) -> _Unfinished:
        number = len(self.finished)
        files = (self.path(number, ending).open("wb", buffering=0) for ending in ("bin", "lengths"))
        return _Unfinished(*files, hashlib.sha256(), 0, 0)

    def _reopened(self, num_tokens: int, num_documents: int) -> _Unfinished:
        number = len(self.finished)
        files, sha256 = [], hashlib.sha256()
        sizes = {"bin": num_tokens * self._form.dtype.itemsize, "lengths": num_documents * 4}
        for ending, size in sizes.items():
            path = self.path(number, ending)
            if not path.is_file() or path.stat().st_size < size:
                raise OSError(f"{path} is shorter than when it was written; start with --fresh.")
            os.truncate(path, size)
            files.append(path.open("r+b", buffering=0))
        while block := files[0].read(_BLOCK_BYTES):
            sha256.update(block)
        files[1].seek(0, os.SEEK_END)
        return _Unfinished(*files, sha256, num_tokens, num_documents)


def _write(file: Any, content: memoryview) -> None:
    """All of it: a file without a buffer may take only a part, as on a disk that runs full."""
    while content:
        content = content[file.write(content) :]
