"""Packed corpora: Megatron's indexed dataset as one stream of tokens."""

import contextlib
import hashlib
import io
import logging
from pathlib import Path

import numpy as np

from est_ds.data.header import Header, read_header
from est_ds.data.manifest import Manifest, manifest_path, read_manifest
from est_ds.errors import UserError

_PROBE_TOKENS = 1 << 14
_NUM_PROBES = 64


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex characters."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def tokenizer_sha256(directory: str | Path) -> str:
    """SHA-256 of `DIRECTORY/tokenizer.model`.

    Raises:
        UserError: There is no such file.
    """
    path = Path(directory) / "tokenizer.model"
    if not path.is_file():
        raise UserError(
            f"tokenizer {directory}: {path} does not exist; give a folder that holds a "
            f"sentencepiece tokenizer.model, or train one with `python -m data_prep tokenizer`."
        )
    return file_sha256(path)


class Corpus:
    """A packed corpus, memory-mapped. Open it with `Corpus.open`.

    Attributes:
        prefix: Common path of `.bin`, `.idx` and `.manifest.json`.
        num_tokens: Length of the stream of all documents, one after the other.
        num_documents: Number of documents.
        vocabulary: Vocabulary size of the tokenizer; None without a manifest.
        tokenizer_sha256: Of `tokenizer.model`; None without a manifest.
        unigram_entropy: In nats per token; None without a manifest.
        fingerprint: 16 hex characters that name the contents: from the manifest's
            hashes, or from `.idx` and the size of `.bin` where there is no manifest.
    """

    def __init__(self, header: Header, manifest: Manifest | None, dataset) -> None:
        self.prefix = header.prefix
        self.header = header
        self.manifest = manifest
        self.num_tokens = header.num_tokens
        self.num_documents = header.num_boundaries - 1
        self.vocabulary = manifest.vocabulary if manifest else None
        self.tokenizer_sha256 = manifest.tokenizer_sha256 if manifest else None
        self.unigram_entropy = manifest.unigram_entropy if manifest else None
        self.fingerprint = manifest.fingerprint if manifest else _foreign_fingerprint(header)
        self._dataset = dataset

    @classmethod
    def open(cls, prefix: str | Path) -> "Corpus":
        """Opens a corpus made by `data_prep pack`, Megatron or GPT-NeoX.

        Raises:
            UserError: Files missing, truncated, or not matching each other or the
                manifest. Hashes are not computed here: `data_prep verify` does that.
        """
        header = read_header(str(prefix))
        manifest = read_manifest(header.prefix)
        if manifest is not None:
            _check_manifest(header, manifest)
        return cls(header, manifest, _open_dataset(header))

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream, across documents.

        Returns:
            int64 [length], a copy.

        Raises:
            IndexError: The window does not lie in the stream.
        """
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"window [{start}, {start + length}) of {self.num_tokens} tokens")
        # The first sequence begins at byte 0 and the others follow without a gap, so an
        # offset from it addresses the whole stream without a search.
        tokens = self._dataset.get(0, offset=int(start), length=int(length))
        return tokens.astype(np.int64)

    def check_tokenizer(self, directory: str | Path) -> None:
        """Checks that `DIRECTORY/tokenizer.model` made this corpus.

        A corpus without a manifest does not name its tokenizer and passes.

        Raises:
            UserError: Made by another tokenizer, or the folder has none.
        """
        found = tokenizer_sha256(directory)
        if self.tokenizer_sha256 not in (None, found):
            raise UserError(
                f"tokenizer {directory}: its tokenizer.model has sha256 {found[:12]}..., but the "
                f"corpus {self.prefix} was made with {self.tokenizer_sha256[:12]}...; give that "
                f"tokenizer, or pack the corpus again with `python -m data_prep pack`."
            )

    def check_vocabulary(self, model_vocabulary: int) -> None:
        """Checks that the model has an embedding for every token.

        Without a manifest the vocabulary is unknown, and up to a million tokens, spread
        evenly over the corpus, are looked at instead.

        Raises:
            UserError: The corpus needs a larger vocabulary.
        """
        needed = self.vocabulary if self.vocabulary is not None else self._probe_vocabulary()
        if needed > model_vocabulary:
            raise UserError(
                f"model vocab_size={model_vocabulary} is smaller than the vocabulary {needed} of "
                f"the corpus {self.prefix}; use at least {needed}, or a corpus packed with a "
                f"smaller tokenizer."
            )

    def _probe_vocabulary(self) -> int:
        length = min(_PROBE_TOKENS, self.num_tokens)
        starts = np.linspace(0, self.num_tokens - length, _NUM_PROBES).astype(np.int64)
        return 1 + max(int(self.window(start, length).max()) for start in np.unique(starts))


def _foreign_fingerprint(header: Header) -> str:
    digest = file_sha256(Path(f"{header.prefix}.idx"))
    return hashlib.sha256(f"{digest}{header.bin_bytes}".encode()).hexdigest()[:16]


def _check_manifest(header: Header, manifest: Manifest) -> None:
    facts = {
        "bin_bytes": header.bin_bytes,
        "idx_bytes": header.idx_bytes,
        "num_tokens": header.num_tokens,
        "num_documents": header.num_boundaries - 1,
        "dtype": header.dtype.name,
    }
    for name, found in facts.items():
        stated = getattr(manifest, name)
        if stated != found:
            raise UserError(
                f"{manifest_path(header.prefix)}: {name}={stated}, but the .bin and .idx files "
                f"beside it have {found}; copy all three again or pack the corpus again with "
                f"`python -m data_prep pack`."
            )


def _open_dataset(header: Header):
    """DeepSpeed's reader, silent, with Megatron's meaning of type code 8 where it holds."""
    # A first import of deepspeed reports the accelerator it found, which is no news here.
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from deepspeed.runtime.data_pipeline.data_sampling import indexed_dataset
    finally:
        logging.disable(disabled)

    deepspeed_types = dict(indexed_dataset.dtypes)
    try:
        if header.dtype == np.uint16:
            indexed_dataset.dtypes[header.type_code] = (np.uint16, None)
        with contextlib.redirect_stdout(io.StringIO()):
            return indexed_dataset.MMapIndexedDataset(header.prefix, skip_warmup=True)
    finally:
        indexed_dataset.dtypes.update(deepspeed_types)
