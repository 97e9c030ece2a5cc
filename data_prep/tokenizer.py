"""Verb `tokenizer`: a tokenizer of the user's texts that Hugging Face loads as it is."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from data_prep.byte_level import train_byte_level
from data_prep.config import SourceConfig
from data_prep.conversion import hugging_face_files
from data_prep.files import staged
from data_prep.readers.base import Document, Rules, Skipped
from data_prep.sources import open_sources, read_documents
from est_ds.data.tokenizer import SENTENCEPIECE
from est_ds.errors import UserError

_CHUNK_CHARACTERS = 1000
_NUM_CHECKS = 200
# Special tokens of every kind; to them come 256 bytes and at least one piece.
_NUM_SPECIAL = {"bpe": 3, "unigram": 3, "bytes": 4}
# sentencepiece's mark of the unknown: it leaves out every text that holds one.
_RESERVED = "\u2585"

# As Llama: bytes for unknown characters, single digits, no normalisation, ids 0-2.
# Unlike Llama no space is put before a text, so that decoding returns it unchanged.
# num_threads is written into the model: it is fixed, or the file would depend on it.
_SETTINGS = {
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "add_dummy_prefix": False,
    "character_coverage": 0.9999,
    "max_sentence_length": 1 << 20,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "num_threads": 2,
    "minloglevel": 2,
}


@dataclass(frozen=True)
class Wish:
    """The tokenizer to train.

    Attributes:
        vocabulary: Number of ids, with special tokens and 256 bytes.
        max_chunks: Chunks of about 1000 characters to train on; those with the smallest hash are
            taken.
        model_type: `bpe` (Llama 2) or `unigram`, of sentencepiece; or `bytes`, a byte-level BPE
            (Llama 3, Qwen, GPT-2).
    """

    vocabulary: int
    max_chunks: int
    model_type: str = "bpe"


def train(sources: Iterable[SourceConfig], out: Path, wish: Wish, rules: Rules = Rules()) -> None:
    """Trains a tokenizer; the same documents give the same files.

    Writes `tokenizer.model` (of a unigram: `spiece.model`; of bytes: neither), and `tokenizer.json`
    and `tokenizer_config.json` with which `transformers.AutoTokenizer` loads it offline and encodes
    as the library that trained it does. This is checked on a sample of the input before anything is
    written.

    Args:
        sources: Where the documents are.
        out: Folder to write into; other files in it are left alone.
        wish: What to train.
        rules: What becomes of documents that are too long or cannot be read.

    Raises:
        UserError: Wrong input, or a vocabulary that the text cannot fill.
    """
    vocabulary, model_type = wish.vocabulary, wish.model_type
    if wish.max_chunks < 1:
        raise UserError(f"--sentences={wish.max_chunks} is not allowed; use at least 1.")
    special = _NUM_SPECIAL[model_type]
    if vocabulary < 256 + special + 1:
        raise UserError(
            f"--vocab={vocabulary} is not allowed; use at least {256 + special + 1}: 256 bytes, "
            f"{special} special tokens and a piece."
        )
    skipped = Skipped()
    documents = read_documents(open_sources(sources), rules, skipped)
    chunks = _sample(documents, wish.max_chunks)
    if not chunks:
        raise skipped.nothing_left()
    samples = chunks[:: max(1, len(chunks) // _NUM_CHECKS)]
    if model_type == "bytes":
        contents = train_byte_level(chunks, vocabulary, samples)
    else:
        parts = [part for chunk in chunks for part in chunk.split(_RESERVED) if part]
        model = _train_model(parts, vocabulary, model_type)
        contents = hugging_face_files(model, model_type, samples)
    _refuse_another_kind(out, contents)
    with staged(*(out / name for name in contents)) as temporary:
        for content, path in zip(contents.values(), temporary, strict=True):
            path.write_bytes(content)
    size = sum(map(len, chunks))
    print(f"{out}: {vocabulary:,} pieces, trained on {len(chunks):,} chunks, {size:,} characters")
    skipped.report()


def _refuse_another_kind(out: Path, contents: Iterable[str]) -> None:
    """A folder must not hold two tokenizers: the wrong one might be taken for it."""
    for name in (SENTENCEPIECE, "spiece.model"):
        if name not in contents and (out / name).exists():
            raise UserError(
                f"--out {out} holds a tokenizer of another kind ({name}); give another folder, or "
                f"remove it."
            )


def _sample(documents: Iterable[Document], max_chunks: int) -> list[str]:
    """At most max_chunks chunks in document order, chosen by hash of place and text."""
    chunks, num_chunks = [], 0
    for document in documents:
        for number, text in enumerate(_chunks(document.text)):
            address = f"{document.id}\0{number}\0{text}".encode()
            key = hashlib.blake2b(address, digest_size=8).digest()
            chunks.append((key, num_chunks, text))
            num_chunks += 1
        if len(chunks) > 2 * max_chunks + 10_000:
            chunks = sorted(chunks)[:max_chunks]
    chosen = sorted(chunks)[:max_chunks]
    return [text for _, _, text in sorted(chosen, key=lambda chunk: chunk[1])]


def _chunks(text: str) -> Iterator[str]:
    """Whole lines with their ends, gathered up to 1000 characters; longer lines are cut."""
    chunk = ""
    for line in text.splitlines(keepends=True):
        while chunk and len(chunk) + len(line) > _CHUNK_CHARACTERS:
            yield chunk[:_CHUNK_CHARACTERS]
            chunk = chunk[_CHUNK_CHARACTERS:]
        chunk += line
    for start in range(0, len(chunk), _CHUNK_CHARACTERS):
        yield chunk[start : start + _CHUNK_CHARACTERS]


def _train_model(chunks: list[str], vocabulary: int, model_type: str) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            vocab_size=vocabulary,
            model_type=model_type,
            **_SETTINGS,
        )
    except (RuntimeError, ValueError) as error:
        # "INTERNAL: file(line) [condition] reason"; the reason may end in advice on its own flags
        reason = str(error).rsplit("] ", 1)[-1].split(" Increase ")[0].strip().rstrip(".")
        raise UserError(
            f"--vocab={vocabulary} does not fit the text of --input, sentencepiece says: {reason}; "
            f"use another --vocab or more text."
        ) from None
    return model.getvalue()
