"""The directory of a run that begins with a checkpoint which it did not write: the one way in.

It is made beside, whole, and then gets its name: a run directory is complete or absent.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from est_ds.checkpoints import index
from est_ds.checkpoints.index import Index
from est_ds.checkpoints.reader import file_damage
from est_ds.checkpoints.store import Store
from est_ds.config.run_config import RunConfig
from est_ds.disk import hold, replace_text, sync_file, sync_folder
from est_ds.errors import UserError
from est_ds.run.directory import LOCK, write_config
from est_ds.run.parent import Parent, write_parent


@dataclass(frozen=True)
class First:
    """The checkpoint that a run begins with.

    Attributes:
        index: its `checkpoint.json`, in whose state the config is the run's own.
        source: the folder where its other files are.
        parent: whose they are.
    """

    index: Index
    source: Path
    parent: Parent


def check_unused(directory: Path) -> None:
    """Refuses a directory in which there is anything.

    Raises:
        UserError: there is.
    """
    if os.path.lexists(directory) and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"--run-dir={str(directory)!r} is there and no empty folder; choose another, or remove "
            f"it."
        )


def begin_run(config: RunConfig, first: First) -> int:
    """Makes a run directory with its config, its first checkpoint and the record of its parent.

    Returns:
        How many files of the checkpoint are hard links; the others are copies.

    Raises:
        UserError: the directory is in use or cannot be written, or the checkpoint is damaged or
            gone.
    """
    directory = Path(os.path.abspath(config.run_dir))
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        with hold(partial / LOCK):
            try:
                _clear(partial)
                links = _fill(partial, config, first)
                check_unused(directory)
                os.rename(partial, directory)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        sync_folder(directory.parent)
    except BlockingIOError:
        raise UserError(
            f"--run-dir={config.run_dir!r} is being made by another process; wait for it, or "
            f"choose another."
        ) from None
    except OSError as e:
        raise UserError(
            f"--run-dir={config.run_dir!r} cannot be made ({e.strerror}: {e.filename}); mend that, "
            f"or choose another."
        ) from None
    return links


def _clear(partial: Path) -> None:
    """Removes what a killed process left."""
    for left in partial.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != LOCK:
            left.unlink()


def _fill(partial: Path, config: RunConfig, first: First) -> int:
    store = Store.of(partial)
    checkpoint = store.path(first.index.step)
    checkpoint.mkdir(parents=True)
    try:
        links = sum(_link(first.source / name, checkpoint / name) for name in first.index.files)
    except FileNotFoundError as e:
        raise UserError(
            f"{first.source} was removed meanwhile ({e.filename} is missing): its run keeps the "
            f"newest checkpoints only; choose another --at, or have it keep more "
            f"(checkpoint.keep_last, checkpoint.keep_every)."
        ) from None
    if wrong := file_damage(checkpoint, first.index):
        raise UserError(f"checkpoint {first.source} is damaged: {wrong}; choose another --at.")
    replace_text(checkpoint / index.FILE, first.index.to_json())
    sync_folder(store.folder)
    store.point_to(first.index.step)
    write_parent(partial, first.parent)
    write_config(config, partial)
    return links


def _link(source: Path, target: Path) -> bool:
    """Gives a file a second name, or copies it where the file system does not allow that; returns
    whether it did the former. Files of checkpoints are never written again."""
    try:
        os.link(source, target)
        return True
    except FileNotFoundError:
        raise
    except OSError:  # another file system, one without hard links, or another user's file
        shutil.copyfile(source, target)
        sync_file(target)
        return False
