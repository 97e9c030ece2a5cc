"""`checkpoint.json`: what a checkpoint holds, and how to know that it is whole."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from est_ds.checkpoints.state import State
from est_ds.config.strict import Stored
from est_ds.disk import File

FILE = "checkpoint.json"
FORMAT = 2
TAG = re.compile(r"step_(\d{8})")


class Damaged(Exception):
    """A checkpoint is not whole; says which file, and what is wrong with it."""


class Index(Stored):
    """Contents of `checkpoint.json`.

    Attributes:
        step: optimizer steps done.
        layout: the layout that wrote it; for people, nothing depends on it.
        parameters: shapes by Hugging Face names.
        files: all other files.
        state: what training needs besides weights and moments.
        eval_loss: held-out loss after these steps, if it was measured.
    """

    format: Literal[2] = 2
    step: int = Field(ge=0)
    layout: dict[str, int]
    parameters: dict[str, tuple[int, ...]]
    files: dict[str, File]
    state: State
    eval_loss: float | None = None

    @field_validator("eval_loss")
    @classmethod
    def _not_measured_if_no_number(cls, loss: float | None) -> float | None:
        return loss if loss is not None and math.isfinite(loss) else None

    def to_json(self) -> str:
        """JSON that ends with a hash of the rest."""
        tree = self.model_dump(mode="json")
        return json.dumps({**tree, "sha256": _digest(tree)}, indent=1) + "\n"


def read_index(checkpoint: Path) -> Index:
    """Reads and checks `checkpoint.json`.

    Raises:
        Damaged: it is missing or not what was written.
    """
    try:
        return parse_index((checkpoint / FILE).read_bytes(), checkpoint.name)
    except FileNotFoundError:
        raise Damaged(f"{FILE} is missing") from None
    except OSError as e:
        raise Damaged(f"{FILE} cannot be read ({type(e).__name__})") from None


def parse_index(content: bytes, folder: str) -> Index:
    """As `read_index`, of what was read.

    Args:
        folder: the name of the folder that it is in.
    """
    try:
        tree = json.loads(content)
        if tree["format"] != FORMAT:
            raise Damaged(
                f"{FILE} is of format {tree['format']}, and this version of est_ds reads {FORMAT}"
            )
        digest = tree.pop("sha256")
        index = Index.model_validate(tree)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Damaged(f"{FILE} is not of this format ({where}: {first['msg']})") from None
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise Damaged(f"{FILE} cannot be read ({type(e).__name__})") from None
    if digest != _digest(tree):
        raise Damaged(f"{FILE} is not what was written (its sha256 differs)")
    tag = TAG.fullmatch(folder)
    if tag and int(tag[1]) != index.step:
        raise Damaged(f"{FILE} is of step {index.step}: the folder was renamed")
    return index


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
