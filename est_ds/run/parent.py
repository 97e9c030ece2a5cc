"""`parent.yaml` in the directory of a branch: the run whose checkpoint it begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from est_ds.config.strict import Strict, checked
from est_ds.config.yaml12 import dump, read_mapping
from est_ds.disk import replace_text

FILE = "parent.yaml"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Parent(Strict):
    """Contents of `parent.yaml`.

    Attributes:
        run_dir: of the parent, absolute; it need not be there any more.
        step: steps done at its checkpoint.
        config_sha256: of its `config.yaml`.
        checkpoint_sha256: of its `checkpoint.json`, which holds the hashes of all other files.
        changed: fields of the run file that the branch changed, each with the parent's value and
            its own; null where one has no such field.
        parent: the parent's own, if it is a branch too.
    """

    run_dir: str
    step: Annotated[int, Field(ge=0)]
    config_sha256: Sha256
    checkpoint_sha256: Sha256
    changed: dict[str, tuple[Any, Any]]
    parent: Parent | None = None


def read_parent(run_dir: Path) -> Parent | None:
    """The parent of a run; None if it has none.

    Raises:
        UserError: the file is not what `write_parent` writes.
    """
    file = run_dir / FILE
    if not file.exists():
        return None
    return checked(Parent, read_mapping(file, "record of the parent"), str(file))


def write_parent(run_dir: Path, parent: Parent) -> None:
    replace_text(run_dir / FILE, dump(parent.model_dump(mode="json")))
