"""What to read and how to pack it: the flags of the command line, or a data file in YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from est_ds.config.run_file import expanded
from est_ds.config.strict import Strict, checked
from est_ds.config.yaml12 import read_mapping
from est_ds.errors import UserError

_PATHS = ("tokenizer", *(f"sources.*.{k}" for k in ("path", "path.*", "data_dir", "data_files*")))
_OF_FILES = ("path", "separator", "plain")
_OF_DATASETS = ("dataset", "name", "data_dir", "data_files", "split", "revision", "streaming")


class SourceConfig(Strict):
    """Documents from local files, or from Hugging Face `datasets`.

    Attributes:
        path: file, folder or glob, or several of them; read in the order of their names.
        text: field (.jsonl) or column (.parquet, dataset) that holds a document's text.
        separator: what stands between the documents of a .txt file; without it a file is one.
        plain: further endings of files that are read as .txt, such as .md or .c.
        dataset: name on the Hub, folder, or loader (`json`, `parquet`) for `data_files`.
        name: the dataset's configuration.
        data_dir: folder within the dataset.
        data_files: files of the dataset: one, several, or by split.
        split: the dataset's split; slices such as `train[:1%]` too, if it is not streamed.
        revision: commit or tag on the Hub; give one, if an interrupted packing may be continued
            after the dataset has changed there.
        streaming: read while downloading, instead of downloading first.
    """

    path: str | tuple[str, ...] | None = None
    text: str = "text"
    separator: Annotated[str, Field(min_length=1)] | None = None
    plain: tuple[str, ...] = ()
    dataset: str | None = None
    name: str | None = None
    data_dir: str | None = None
    data_files: str | tuple[str, ...] | dict[str, str | tuple[str, ...]] | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> SourceConfig:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("a source needs either path (local files) or dataset (Hugging Face)")
        foreign = _OF_DATASETS if self.path is not None else _OF_FILES
        for field in foreign:
            if field in self.model_fields_set:
                kind = "path" if self.path is not None else "dataset"
                raise ValueError(f"{field} has no effect on a source with {kind}; remove it")
        wrong = [ending for ending in self.plain if not re.fullmatch(r"\.[^/]+", ending)]
        if wrong:
            raise ValueError(f"plain={wrong[0]!r}: an ending begins with a dot, such as .md")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path or ()


class Preparation(Strict):
    """A data file.

    Attributes:
        sources: where the documents come from, in this order.
        tokenizer: folder (or file) of the tokenizer.
        bos: whether the tokenizer's BOS stands before every document; None: if it has one that
            is not its EOS.
        eos: whether its EOS stands after every document; None: if it has one.
        held_out: share of the documents, chosen by hash of their text, that goes into a corpus of
            its own.
        shard_tokens: a shard ends with the document that reaches this number.
        type_codes: whose reader finds the type of the tokens in the `.idx`: DeepSpeed numbers
            uint16 in one way, Megatron-LM and GPT-NeoX in another. A run reads both.
        max_document_bytes: longer documents are left out, and counted.
        invalid: what to do with a document that cannot be read (no JSON, no UTF-8, no text).
    """

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    tokenizer: str | None = None
    bos: bool | None = None
    eos: bool | None = None
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    shard_tokens: Annotated[int, Field(ge=1)] = 1 << 31
    type_codes: Literal["deepspeed", "megatron"] = "deepspeed"
    max_document_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = 1 << 26
    invalid: Literal["error", "skip"] = "error"


def read_data_file(path: Path) -> Preparation:
    """Reads a data file.

    Raises:
        UserError: it cannot be read, or something in it is wrong.
    """
    tree = expanded(read_mapping(path, "--config"), _PATHS)
    try:
        return checked(Preparation, tree)
    except UserError as error:
        raise UserError(f"--config {path}: {error}".replace("run file", "data file")) from None
