"""The manifest beside a packed corpus: what the files hold and how they were made."""

import hashlib
import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from est_ds.config.kinds import is_url
from est_ds.data.remote import Remote, RemoteError, RemoteMissing, persistent
from est_ds.errors import UserError

FORMAT_VERSION = 2
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]

# Fields of a shard that stood in the manifest itself while a corpus was one pair of files.
_FIELDS_OF_ONE_PAIR = ("bin_bytes", "idx_bytes", "bin_sha256", "idx_sha256")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Shard(_Strict):
    """One pair of files, `PREFIX + suffix` + `.bin` and `.idx`.

    Attributes:
        suffix: empty for a corpus of one pair, else a dash and five digits.
        num_tokens: Tokens in `.bin`.
        num_documents: Documents; none lies in two shards.
    """

    suffix: Annotated[str, Field(pattern="^(-[0-9]{5,})?$")]
    num_tokens: Positive
    num_documents: Positive
    bin_bytes: Positive
    idx_bytes: Positive
    bin_sha256: Sha256
    idx_sha256: Sha256


class Manifest(_Strict):
    """Contents of `PREFIX.manifest.json`; unknown or missing fields are refused.

    Attributes:
        num_tokens: Tokens of all shards, BOS and EOS included.
        num_documents: Documents; each is BOS + text + EOS.
        dtype: Type of one token in `.bin`.
        vocabulary: Size of the tokenizer's vocabulary; every token is below it.
        bos_id: Token put before each document, None if none was put.
        eos_id: Token put after each document, None if none was put.
        unknown_id: Token of text that the tokenizer cannot express, None if it has none.
        text_bytes: UTF-8 bytes of all documents.
        unigram_entropy: Entropy of the token frequencies in nats per token: the
            loss of the best model that ignores context.
        tokenizer_sha256: Of the file that defines the tokenizer (`tokenizer_sha256`).
        tokenizer_fingerprint: Of all that changes its ids (`tokenizer_fingerprint`); None in
            manifests written before there was one.
        part: `all` documents, or the `train` or `valid` side of a split by hash.
        held_out: Expected share of the `valid` side; None if `part` is `all`.
        skipped: Documents left out of all parts, by reason.
        sources: Where the documents came from, as given to `pack`.
        shards: The files, in the order of the stream.
    """

    format_version: Literal[2]
    num_tokens: Positive
    num_documents: Positive
    dtype: Literal["uint16", "int32"]
    vocabulary: Positive
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    text_bytes: Count
    unigram_entropy: float = Field(ge=0)
    tokenizer_sha256: Sha256
    tokenizer_fingerprint: Sha256 | None = None
    part: Literal["all", "train", "valid"]
    held_out: float | None
    skipped: dict[str, Positive]
    sources: list[dict[str, Any]]
    shards: list[Shard] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, content: Any) -> Any:
        """Version 1 as version 2: one pair of files, of which less was written down."""
        if not isinstance(content, dict) or content.get("format_version") != 1:
            return content
        totals = {k: content[k] for k in ("num_tokens", "num_documents") if k in content}
        pair = {k: content[k] for k in _FIELDS_OF_ONE_PAIR if k in content}
        rest = {k: v for k, v in content.items() if k not in _FIELDS_OF_ONE_PAIR}
        unknown = {"unknown_id": None, "part": "all", "held_out": None, "skipped": {}}
        shards = [{"suffix": "", **totals, **pair}]
        return rest | unknown | {"format_version": 2, "sources": [], "shards": shards}

    @property
    def fingerprint(self) -> str:
        """16 hex characters that change with any byte of the corpus."""
        digests = "".join(shard.bin_sha256 + shard.idx_sha256 for shard in self.shards)
        return hashlib.sha256(digests.encode()).hexdigest()[:16]

    def bits_per_byte(self, nats_per_token: float, *, apart: bool = False) -> float | None:
        """A loss per byte of text, which other tokenizers can be compared by; None without text.

        Args:
            nats_per_token: of next-token prediction, with every token a target.
            apart: of documents kept apart, the first token of each is none.
        """
        if not self.text_bytes:
            return None
        targets = self.num_tokens - (self.num_documents if apart else 0)
        return nats_per_token * targets / self.text_bytes / math.log(2)


def manifest_path(prefix: str) -> Path:
    """Path of the manifest of the corpus `prefix`."""
    return Path(f"{prefix}.manifest.json")


def read_manifest(prefix: str) -> Manifest | None:
    """Reads the manifest of a corpus; None if it has none.

    Args:
        prefix: of a corpus here, or in a bucket.

    Raises:
        UserError: The file is there but is not a manifest of this format; or the bucket cannot be
            read.
    """
    path = manifest_path(prefix)
    if is_url(prefix):
        content = _remote_manifest(prefix)
    else:
        content = path.read_bytes() if path.is_file() else None
    if content is None:
        return None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path}: {field}: {first['msg']}; expected a manifest of format version "
            f"{FORMAT_VERSION}; pack the corpus again with `python -m data_prep pack`."
        ) from None


def known_manifest(prefix: str) -> Manifest | None:
    """As `read_manifest`; None also where a bucket cannot be read."""
    try:
        return read_manifest(prefix)
    except UserError:
        if is_url(prefix):
            return None
        raise


@cache
def _remote_manifest(prefix: str) -> bytes | None:
    folder, _, name = prefix.rpartition("/")
    try:
        remote = Remote(folder, f"corpus {prefix}")
        return persistent(lambda: remote.read(f"{name}.manifest.json"))
    except RemoteMissing:
        return None
    except RemoteError as e:
        raise UserError(
            f"corpus {prefix}: {e}; see that the name is right and that this machine may read it, "
            f"or give a local path."
        ) from None
