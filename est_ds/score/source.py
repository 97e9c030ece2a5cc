"""The Hugging Face folder of a checkpoint: everything here loads the model from one."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from est_ds.checkpoints.index import Damaged, Index, read_index
from est_ds.checkpoints.store import Store
from est_ds.config.run_config import RunConfig
from est_ds.data.loader import Windows
from est_ds.design import Design, make_design
from est_ds.disk import hold
from est_ds.errors import UserError
from est_ds.export import Wish, export
from est_ds.export.folder import export_of
from est_ds.run.directory import check_run_dir
from est_ds.run.prepare import held_out_windows

_PREFIX, _HELD = ".export_", "held"  # of folders for the time being


@dataclass(frozen=True)
class Source:
    """A checkpoint, in plain transformers.

    Attributes:
        folder: the exported model.
        where: what the folder is, for the user.
        index: of the checkpoint.
        windows: of the held-out corpora, by name.
    """

    design: Design
    folder: Path
    where: str
    index: Index
    windows: dict[str, Windows]

    @property
    def config(self) -> RunConfig:
        return self.design.config

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def step(self) -> int:
        return self.index.step

    def model(self) -> nn.Module:
        """Loads the model, in the precision of the run."""
        import transformers

        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        auto_class = getattr(transformers, self.design.family.auto_class)
        return auto_class.from_pretrained(self.folder, dtype=dtype).eval()

    def tokenizer(self) -> Any:
        """Loads the tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)


@contextmanager
def exported(config: RunConfig, checkpoint: str) -> Iterator[Source]:
    """Takes the run's `export` folder if it holds the checkpoint, or makes one for the time being.

    Args:
        checkpoint: `latest`, `best`, or a number of steps.

    Raises:
        UserError: as `export`; or the run directory cannot be written.
        Failure: as `export`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    store = Store.of(config.run_dir)
    step = store.find(checkpoint)
    check_run_dir(config)
    index = _index(store, step)
    folder = export_of(config, step)
    if folder is not None:
        yield _source(config, folder, index, str(folder))
        return
    try:
        for left in Path(config.run_dir).glob(f"{_PREFIX}*"):
            _remove_if_left(left)
        beside = TemporaryDirectory(dir=config.run_dir, prefix=_PREFIX)
    except OSError as e:
        raise UserError(
            f"run_dir={config.run_dir!r} cannot be written ({e.strerror}); mend that, or give a "
            f"copy of it."
        ) from None
    with beside as made, hold(Path(made, _HELD)):
        wish = Wish(out=Path(made, "export"), checkpoint=str(step), skip_loss=True)
        done = export(config, wish)
        where = f"an export for this alone; `est-ds export {config.run_dir}` keeps one"
        yield _source(config, done.folder, index, where)


def _remove_if_left(folder: Path) -> None:
    """Removes the folder of a process that was killed: nobody holds its file."""
    try:
        with (folder / _HELD).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    except OSError:  # it is held, or has just been made or removed, or there are no locks
        return


def _index(store: Store, step: int) -> Index:
    """Reads it first: a training under way may remove the checkpoint once it is exported."""
    with store.reading(step):
        try:
            return read_index(store.path(step))
        except Damaged as e:
            raise UserError(
                f"checkpoint {store.path(step)} is damaged: {e}; choose another one."
            ) from None


def _source(config: RunConfig, folder: Path, index: Index, where: str) -> Source:
    design = make_design(config)
    return Source(design, folder, where, index, held_out_windows(design))
