"""The manifest beside a packed corpus: what the files hold and how they were made."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from est_ds.errors import UserError

FORMAT_VERSION = 1
_Sha256 = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """Contents of `PREFIX.manifest.json`; unknown or missing fields are refused.

    Attributes:
        num_tokens: Tokens in `.bin`, BOS and EOS included.
        num_documents: Documents; each is BOS + text + EOS.
        dtype: Type of one token in `.bin`.
        vocabulary: Size of the tokenizer's vocabulary; every token is below it.
        bos_id: Token put before each document, None if there is none.
        eos_id: Token put after each document, None if there is none.
        text_bytes: UTF-8 bytes of all documents.
        unigram_entropy: Entropy of the token frequencies in nats per token: the
            loss of the best model that ignores context.
        tokenizer_sha256: Of the tokenizer's `tokenizer.model`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: Literal[1]
    num_tokens: int = Field(ge=1)
    num_documents: int = Field(ge=1)
    dtype: Literal["uint16", "int32"]
    vocabulary: int = Field(ge=1)
    bos_id: int | None
    eos_id: int | None
    text_bytes: int = Field(ge=0)
    unigram_entropy: float = Field(ge=0)
    tokenizer_sha256: str = _Sha256
    bin_bytes: int = Field(ge=1)
    idx_bytes: int = Field(ge=1)
    bin_sha256: str = _Sha256
    idx_sha256: str = _Sha256

    @property
    def fingerprint(self) -> str:
        """16 hex characters that change with any byte of the corpus."""
        return hashlib.sha256(f"{self.bin_sha256}{self.idx_sha256}".encode()).hexdigest()[:16]


def manifest_path(prefix: str) -> Path:
    """Path of the manifest of the corpus `prefix`."""
    return Path(f"{prefix}.manifest.json")


def read_manifest(prefix: str) -> Manifest | None:
    """Reads the manifest of a corpus; None if it has none.

    Raises:
        UserError: The file is there but is not a manifest of this format.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path}: {field}: {first['msg']}; expected a manifest of format version "
            f"{FORMAT_VERSION}; pack the corpus again with `python -m data_prep pack`."
        ) from None
