"""Packed corpora: Megatron's indexed dataset, in one pair of files or many, as one stream."""

import hashlib
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from est_ds.config.kinds import is_url
from est_ds.data.header import AGAIN, Header, read_header
from est_ds.data.manifest import Manifest, Shard, known_manifest, manifest_path, read_manifest
from est_ds.data.staging import is_staged, staged_corpus
from est_ds.data.token_range import token_range
from est_ds.data.tokenizer import file_sha256, tokenizer_fingerprint, tokenizer_sha256
from est_ds.errors import LocalFailure, UserError

_PROBE_TOKENS = 1 << 14
_NUM_PROBES = 64


class Corpus:
    """A packed corpus, memory-mapped. Open it with `Corpus.open`.

    Attributes:
        prefix: Common path of the shards and of `.manifest.json`.
        shards: One for each pair of files, in the order of the stream.
        manifest: None of a corpus made elsewhere.
        num_tokens: Length of the stream of all documents, one after the other.
        num_documents: Number of documents.
        vocabulary: Vocabulary size of the tokenizer; None without a manifest.
        tokenizer_sha256: Of the tokenizer's defining file; None without a manifest.
        unigram_entropy: In nats per token; None without a manifest.
        fingerprint: 16 hex characters that name the contents: from the manifest's
            hashes, or from `.idx` and the size of `.bin` where there is no manifest.
    """

    def __init__(self, prefix: str, headers: Sequence[Header], manifest: Manifest | None) -> None:
        self.prefix = prefix
        self.shards = tuple(OpenShard(header) for header in headers)
        self.manifest = manifest
        # Where the shards begin in the stream, and its end.
        self._first_tokens = np.cumsum([0, *(h.num_tokens for h in headers)])
        self._first_documents = np.cumsum([0, *(h.num_documents for h in headers)])
        self.num_tokens = int(self._first_tokens[-1])
        self.num_documents = int(self._first_documents[-1])
        if manifest:  # which says the same, and all there is of a corpus that is only described
            self.num_tokens, self.num_documents = manifest.num_tokens, manifest.num_documents
        self.vocabulary = manifest.vocabulary if manifest else None
        self.tokenizer_sha256 = manifest.tokenizer_sha256 if manifest else None
        self.unigram_entropy = manifest.unigram_entropy if manifest else None
        self.fingerprint = manifest.fingerprint if manifest else _foreign_fingerprint(headers[0])
        # Of a model that may have no embedding for some token, which nobody has looked for.
        self._unproven_vocabulary: int | None = None

    @classmethod
    def open(cls, prefix: str | Path) -> "Corpus":
        """Opens a corpus made by `data_prep pack`, Megatron or GPT-NeoX; one in a bucket is copied
        to this machine first.

        Raises:
            UserError: Files missing, truncated, or not matching each other or the
                manifest. Hashes are not computed here: `check_hashes` does that.
        """
        prefix = staged_corpus(str(prefix))
        manifest = read_manifest(prefix)
        if manifest is None:
            if Path(f"{prefix}-00000.idx").is_file():
                raise UserError(
                    f"corpus {prefix}: its shards are there, but not {manifest_path(prefix)}, "
                    f"which names them; copy it beside them, or pack the corpus again."
                )
            group = re.fullmatch(r"(.*)-\d{5}", prefix)
            if group and manifest_path(group[1]).is_file():
                raise UserError(
                    f"corpus {prefix} is one shard of {group[1]}; give that prefix, which stands "
                    f"for all of them."
                )
            return cls(prefix, [read_header(prefix)], None)
        headers = [read_header(prefix + shard.suffix) for shard in manifest.shards]
        for header, shard in zip(headers, manifest.shards, strict=True):
            _check_shard(prefix, header, shard, manifest.dtype)
        for name in ("num_tokens", "num_documents"):
            total, stated = sum(getattr(h, name) for h in headers), getattr(manifest, name)
            if total != stated:
                raise UserError(
                    f"{manifest_path(prefix)}: {name}={stated}, but its shards have {total}; "
                    f"{AGAIN}"
                )
        return cls(prefix, headers, manifest)

    @classmethod
    def described(cls, prefix: str) -> "Corpus | None":
        """A corpus as far as it is here: in whole, or what its manifest says of it (then without
        `shards`, and nothing of it can be read); None if nothing of it is here.

        Raises:
            UserError: As of `open`, where its files are here.
        """
        if any(Path(f"{prefix}{suffix}.idx").is_file() for suffix in ("", "-00000")):
            return cls.open(prefix)
        manifest = known_manifest(prefix)
        if manifest and is_url(prefix) and is_staged(prefix, manifest):
            return cls.open(prefix)
        return cls(prefix, (), manifest) if manifest else None

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream, across documents and shards.

        Returns:
            int64 [length], a copy.

        Raises:
            IndexError: The window does not lie in the stream.
            LocalFailure: It holds a token that `check_vocabulary` could not see.
        """
        start, length = int(start), int(length)
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"window [{start}, {start + length}) of {self.num_tokens} tokens")
        window, done = np.empty(length, np.int64), 0
        shard = int(np.searchsorted(self._first_tokens, start, side="right")) - 1
        while done < length:
            inside = start + done - int(self._first_tokens[shard])
            part = self.shards[shard].tokens[inside : inside + length - done]
            window[done : done + len(part)] = part
            done, shard = done + len(part), shard + 1
        if self._unproven_vocabulary is not None and length:
            present = int(window.min()), int(window.max())
            if wrong := self._outside(*present, self._unproven_vocabulary):
                raise LocalFailure(wrong)
        return window

    def document_start(self, documents: np.ndarray) -> np.ndarray:
        """Where documents begin in the stream, in tokens.

        Args:
            documents: Numbers of documents, int64 of any shape, each from 0 to `num_documents`:
                the last stands for the end of the stream.

        Returns:
            int64 of the same shape.
        """
        documents = np.asarray(documents)
        if len(self.shards) == 1:
            return self.shards[0].document_start(documents)
        starts = np.full(documents.shape, self.num_tokens, np.int64)
        numbers = np.searchsorted(self._first_documents, documents, side="right") - 1
        for number in np.unique(numbers):
            if number < len(self.shards):  # else the end of the stream
                chosen = numbers == number
                inside = documents[chosen] - self._first_documents[number]
                first = self._first_tokens[number]
                starts[chosen] = first + self.shards[number].document_start(inside)
        return starts

    def check_unchanged(self) -> None:
        """Compares the files that are being read with what they were when the corpus was opened;
        reading one beyond its end would kill the process.

        Raises:
            LocalFailure: One was removed, replaced or changed, or cannot be reached.
        """
        for shard in self.shards:
            shard.check_unchanged()

    def check_hashes(self) -> None:
        """Reads every byte and compares it with the manifest's hashes, at about 1 GB/s.

        Raises:
            UserError: A file changed since it was packed, or there is no manifest.
        """
        if self.manifest is None:
            raise UserError(
                f"corpus {self.prefix}: {manifest_path(self.prefix)} does not exist, so there are "
                f"no hashes to check; copy the manifest beside the corpus, or do not ask for it."
            )
        for shard in self.manifest.shards:
            check_shard_hashes(self.prefix, shard)

    def check_tokenizer(self, tokenizer: str | Path) -> None:
        """Checks that this tokenizer made this corpus.

        A corpus without a manifest does not name its tokenizer and passes; a manifest of old names
        only the file that defines it.

        Raises:
            UserError: Made by another tokenizer or with other settings, or the folder has none.
        """
        found = tokenizer_sha256(tokenizer)
        if self.tokenizer_sha256 not in (None, found):
            raise UserError(
                f"tokenizer {tokenizer}: it has sha256 {found[:12]}..., but the corpus "
                f"{self.prefix} was made with {self.tokenizer_sha256[:12]}...; give that "
                f"tokenizer, or pack the corpus again with `python -m data_prep pack`."
            )
        made_with = self.manifest.tokenizer_fingerprint if self.manifest else None
        if made_with not in (None, tokenizer_fingerprint(tokenizer)):
            raise UserError(
                f"tokenizer {tokenizer}: its settings are not those that the corpus {self.prefix} "
                f"was made with (a file beside the vocabulary, such as tokenizer_config.json, was "
                f"added, removed or changed in what makes ids); give that tokenizer, or pack the "
                f"corpus again with `python -m data_prep pack`."
            )

    def check_boundaries(self) -> None:
        """Checks that documents follow one another, for what depends on where they begin.

        Reads the whole index, 20 bytes a document.

        Raises:
            UserError: They do not.
        """
        for shard in self.shards:
            shard.header.check_entries()

    def check_vocabulary(self, vocabulary: int, field: str = "model vocab_size") -> None:
        """Checks that every token is below a vocabulary, as of the model's embedding.

        Without a manifest the vocabulary is unknown, and the tokens are looked at (`token_range`).
        Of a corpus that is too much for that, up to a million tokens spread evenly over it are, and
        every window when it is read.

        Raises:
            UserError: The corpus needs a larger vocabulary.
        """
        if self.vocabulary is not None:
            if self.vocabulary > vocabulary:
                raise UserError(
                    f"{field}={vocabulary} is smaller than the vocabulary {self.vocabulary} of "
                    f"the corpus {self.prefix}; use at least {self.vocabulary}, or a corpus "
                    f"packed with a smaller tokenizer."
                )
            return
        known = token_range(self.shards[0].header)
        if wrong := self._outside(*(known or self._probed_range()), vocabulary, field):
            raise UserError(wrong)
        self._unproven_vocabulary = None if known else vocabulary

    def _outside(
        self, smallest: int, largest: int, vocabulary: int, field: str = "vocabulary"
    ) -> str | None:
        """What is wrong with tokens that may not be below a vocabulary."""
        if smallest < 0:
            return (
                f"corpus {self.prefix}: it holds the token {smallest}, and tokens count from 0; "
                f"the type in its .idx may be wrong: pack it again as uint16 or int32."
            )
        if largest >= vocabulary:
            return (
                f"corpus {self.prefix}: it holds the token {largest}, but {field}={vocabulary} "
                f"is smaller; use at least {largest + 1}, or a corpus packed with a smaller "
                f"tokenizer."
            )
        return None

    def _probed_range(self) -> tuple[int, int]:
        length = min(_PROBE_TOKENS, self.num_tokens)
        starts = np.linspace(0, self.num_tokens - length, _NUM_PROBES).astype(np.int64)
        probed = [self.window(start, length) for start in np.unique(starts)]
        return min(int(t.min()) for t in probed), max(int(t.max()) for t in probed)


class OpenShard:
    """One pair of files, mapped when it is first read."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._opened = {file: _size_and_time(file) for file in self._files}

    @cached_property
    def tokens(self) -> np.ndarray:
        self._compare()
        return self.header.tokens()

    @cached_property
    def index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths [S], byte offsets [S] and boundaries [D]."""
        self._compare()
        return self.header.arrays()

    @property
    def _files(self) -> tuple[str, str]:
        return f"{self.header.prefix}.bin", f"{self.header.prefix}.idx"

    def check_unchanged(self) -> None:
        """As `Corpus.check_unchanged`, of what has been mapped; the rest is looked at then."""
        if not vars(self).keys().isdisjoint(("tokens", "index")):
            self._compare()

    def _compare(self) -> None:
        for file, opened in self._opened.items():
            try:
                wrong = None if _size_and_time(file) == opened else "was changed or replaced"
            except OSError as e:
                wrong = f"cannot be read any more ({e.strerror})"
            if wrong:
                raise LocalFailure(
                    f"{file} {wrong} while the run was reading it; put the corpus back as it was "
                    f"and start the run again."
                )

    def document_start(self, documents: np.ndarray) -> np.ndarray:
        """As `Corpus.document_start`, in this shard."""
        _, offsets, boundaries = self.index
        sequences = boundaries[documents]
        # A document may begin behind the last sequence: the end, or one that is empty.
        inside = sequences < self.header.num_sequences
        starts = offsets[np.where(inside, sequences, 0)] // self.header.dtype.itemsize
        return np.where(inside, starts, self.header.num_tokens)


def _size_and_time(file: str) -> tuple[int, int]:
    # Not the inode, which some network file systems make up anew.
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def check_shard_hashes(prefix: str, shard: Shard) -> None:
    """Compares both files of a shard with its hashes.

    Raises:
        UserError: A file changed since it was packed.
    """
    for ending, expected in (("bin", shard.bin_sha256), ("idx", shard.idx_sha256)):
        path = Path(f"{prefix}{shard.suffix}.{ending}")
        found = file_sha256(path)
        if found != expected:
            raise UserError(
                f"{path}: sha256 {found[:12]}..., but the manifest has {expected[:12]}...: changed "
                f"since it was packed; {AGAIN}"
            )


def _foreign_fingerprint(header: Header) -> str:
    digest = file_sha256(Path(f"{header.prefix}.idx"))
    return hashlib.sha256(f"{digest}{header.bin_bytes}".encode()).hexdigest()[:16]


def _check_shard(prefix: str, header: Header, shard: Shard, dtype: str) -> None:
    facts = {
        "bin_bytes": (shard.bin_bytes, header.bin_bytes),
        "idx_bytes": (shard.idx_bytes, header.idx_bytes),
        "num_tokens": (shard.num_tokens, header.num_tokens),
        "num_documents": (shard.num_documents, header.num_documents),
        "dtype": (dtype, header.dtype.name),
    }
    for name, (stated, found) in facts.items():
        if stated != found:
            raise UserError(
                f"{manifest_path(prefix)}: {name}={stated}, but {header.prefix}.bin and .idx "
                f"beside it have {found}; {AGAIN}"
            )
