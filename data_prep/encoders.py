"""Tokenizers as packing uses them: text to ids, and the ids that stand around documents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from est_ds.data.tokenizer import SENTENCEPIECE, defining_files
from est_ds.errors import UserError


@dataclass(frozen=True)
class Encoder(ABC):
    """A tokenizer that can be sent to another process.

    Attributes:
        definition: contents of `tokenizer.model`, or the text of `tokenizer.json`.
        vocabulary: every id is below it.
        bos_id: None if it has none; as are eos_id and unknown_id.
    """

    definition: bytes | str
    vocabulary: int
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None

    @abstractmethod
    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts on one thread, with nothing put around them: text that spells a special
        token stays text."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """A text of these ids, special tokens spelled out. It need not be the text that was
        encoded: spaces, cases and unknown characters may be lost."""


class SentencePiece(Encoder):
    @cached_property
    def _processor(self):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.definition)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class HuggingFace(Encoder):
    @cached_property
    def _tokenizer(self):
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_str(self.definition)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def load_encoder(tokenizer: str | Path) -> Encoder:
    """Loads a tokenizer.

    Args:
        tokenizer: folder that holds a sentencepiece `tokenizer.model` or a Hugging Face
            tokenizer, or one of its files. A folder with both is read by sentencepiece.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    files = defining_files(tokenizer)
    if files[0].name == SENTENCEPIECE:
        return _load_sentencepiece(files[0])
    return _load_hugging_face(files)


def load_processor(path: Path):
    """A sentencepiece model.

    Raises:
        UserError: it is none.
    """
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise UserError(
            f"--tokenizer: {path} is not a sentencepiece model; copy it again, train one with "
            f"`python -m data_prep tokenizer`, or give the tokenizer.json beside it, if there is "
            f"one."
        ) from None


def _load_sentencepiece(path: Path) -> Encoder:
    processor = load_processor(path)
    ids = (processor.bos_id(), processor.eos_id(), processor.unk_id())
    special = (None if id_ < 0 else id_ for id_ in ids)
    return SentencePiece(path.read_bytes(), processor.vocab_size(), *special)


def _load_hugging_face(files: list[Path]) -> Encoder:
    from transformers import AutoTokenizer

    folder = files[0].parent
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = loaded.backend_tokenizer
    except Exception as error:  # whatever the library raises for files it cannot read
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--tokenizer: Hugging Face cannot load {folder} as a fast tokenizer "
            f"({type(error).__name__}: {reason}); copy it again, or save it with "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        ) from None
    # BERT's kind has no BOS and EOS; what stands around its documents are CLS and SEP.
    bos = loaded.cls_token_id if loaded.bos_token_id is None else loaded.bos_token_id
    eos = loaded.sep_token_id if loaded.eos_token_id is None else loaded.eos_token_id
    vocabulary = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    return HuggingFace(backend.to_str(), vocabulary, bos, eos, loaded.unk_token_id)


def surrounding_ids(
    encoder: Encoder, bos: bool | None, eos: bool | None
) -> tuple[int | None, int | None]:
    """Ids to put before and after every document.

    Args:
        bos: whether BOS is put; None: if there is one that is not EOS too (as it is in GPT-2).
        eos: whether EOS is put; None: if there is one.

    Raises:
        UserError: the tokenizer has none to put.
    """
    for name, wanted, id_ in (("bos", bos, encoder.bos_id), ("eos", eos, encoder.eos_id)):
        if wanted and id_ is None:
            raise UserError(
                f"--{name}: this tokenizer has no {name.upper()} token; leave --{name} out."
            )
    if bos is None:
        bos = encoder.bos_id not in (None, encoder.eos_id)
    if eos is None:
        eos = encoder.eos_id is not None
    return (encoder.bos_id if bos else None), (encoder.eos_id if eos else None)
