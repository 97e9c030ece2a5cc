"""Tokenizers as packing uses them: text to ids, and the ids that stand around documents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from est_ds.data.auto_tokenizer import check_same_ids, load_tokenizer
from est_ds.data.tokenizer import defining_files, sentencepiece_alone
from est_ds.errors import UserError


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that can be sent to another process; its ids are those of transformers.

    Attributes:
        definition: text of its `tokenizer.json`.
        vocabulary: every id is below it.
        bos_id: None if it has none; as are eos_id and unknown_id.
        sentencepiece: contents of a `tokenizer.model` that stands alone; what sentencepiece makes
            of every text is compared.
    """

    definition: str
    vocabulary: int
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    sentencepiece: bytes | None = None

    @cached_property
    def _tokenizer(self):
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_str(self.definition)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _processor(self):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.sentencepiece)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts on one thread, with nothing put around them: text that spells a special
        token stays text.

        Raises:
            UserError: sentencepiece gives others.
        """
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [one.ids for one in encoded]
        if self.sentencepiece is not None:
            expected = self._processor.encode(texts, num_threads=1)
            for compared in zip(texts, ids, expected, strict=True):
                check_same_ids(*compared)
        return ids

    def decode(self, ids: list[int]) -> str:
        """A text of these ids, special tokens spelled out. It need not be the text that was
        encoded: spaces, cases and unknown characters may be lost."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def load_encoder(tokenizer: str | Path) -> Encoder:
    """Loads a tokenizer as transformers loads its folder.

    Args:
        tokenizer: folder of a Hugging Face tokenizer or of a sentencepiece `tokenizer.model`, or
            one of its files.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    loaded = load_tokenizer(tokenizer)
    backend = loaded.backend_tokenizer
    # BERT's kind has no BOS and EOS; what stands around its documents are CLS and SEP.
    bos = loaded.cls_token_id if loaded.bos_token_id is None else loaded.bos_token_id
    eos = loaded.sep_token_id if loaded.eos_token_id is None else loaded.eos_token_id
    return Encoder(
        backend.to_str(),
        1 + max(backend.get_vocab(with_added_tokens=True).values()),
        bos,
        eos,
        loaded.unk_token_id,
        defining_files(tokenizer)[0].read_bytes() if sentencepiece_alone(tokenizer) else None,
    )


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
