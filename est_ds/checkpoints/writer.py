"""Writes an engine's state as a checkpoint without a layout, and loads it into any engine.

DeepSpeed's own checkpoints do not serve: their files belong to a layout, are no checkpoint until a
converter of the whole run has gone over them, name the parameters of a pipeline and of a plain
engine differently, and are neither atomic nor asynchronous. Only its tables of who holds what are
used (`fragments.py`).

Every rank writes its ranges into `.step_XXXXXXXX.partial`, on a thread, and then leaves their size
and hash at the store on rank 0. Once all have, rank 0 adds `checkpoint.json`, renames the folder
and moves `latest`: a checkpoint is complete or absent.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from est_ds.checkpoints import index
from est_ds.checkpoints.board import Board, Shapes
from est_ds.checkpoints.copier import Copier
from est_ds.checkpoints.index import Index
from est_ds.checkpoints.reader import fragment_key
from est_ds.checkpoints.state import State
from est_ds.checkpoints.store import Store, tag_of
from est_ds.disk import File, describe, replace_text, sync_file, sync_folder
from est_ds.engine.base import Engine
from est_ds.errors import Failure, gigabytes
from est_ds.ranks.gather import dealt, first_of_all, gathered_on_rank_0, largest, of_rank_0
from est_ds.ranks.preempt import Preempted

LAST_WAIT_S = 60.0  # for a write that is under way when training fails


@dataclass(frozen=True)
class _Content:
    """What rank 0 adds to the files of the ranks."""

    partial: Path
    step: int
    state: State
    eval_loss: float | None


class Saver:
    """Writes checkpoints; every rank has one and calls its methods together.

    To be used in a `with`, at whose end nothing is being written or copied any more.

    Args:
        copier: copies them to a bucket; None: nothing does.
    """

    def __init__(self, engine: Engine, store: Store, copier: Copier | None = None) -> None:
        self._engine, self._store, self._copier = engine, store, copier
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._board = Board(self._rank, self._num_ranks)
        everyone = gathered_on_rank_0((socket.gethostname(), engine.fragments.num_bytes))
        self._host_bytes, self._total_bytes = dealt(_sums(everyone) if everyone else None)
        self._content: _Content | None = None  # of the checkpoint that is being written
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._on_rank_0(self._open)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self.finish()
            if self._copier:
                self._copier.require()
        elif self._thread is not None:
            # Other ranks may be gone: no communication.
            self._thread.join(LAST_WAIT_S)
            deadline = time.monotonic() + LAST_WAIT_S * (self._rank == 0)
            while self._content and not self._error and time.monotonic() < deadline:
                self.poll()
                time.sleep(0.1)
        if self._copier and (kind is None or issubclass(kind, (Preempted, Failure))):
            # A notice leaves as much time as the end; after a failure most is copied.
            is_failure = kind is not None and issubclass(kind, Failure)
            self._copier.close(LAST_WAIT_S if is_failure else None)

    def check_space(self) -> None:
        """Compares free disk space with what a checkpoint takes.

        Raises:
            Failure: there is less, or the store is not what it was at the start.
        """
        free = self._on_rank_0(self._free_bytes)
        if free < self._total_bytes:
            raise Failure(
                f"a checkpoint takes {gigabytes(self._total_bytes)} and {self._store.folder} has "
                f"{gigabytes(free)} free; make room there, or lower checkpoint.keep_last, and "
                f"start the run again: it resumes from its last checkpoint."
            )

    def save(self, step: int, state: State, eval_loss: float | None) -> None:
        """Saves after `step` steps; the writing itself may go on after the call.

        Raises:
            Failure: this or the former checkpoint cannot be written, or copies of a parameter
                differ; or the former one cannot be copied, and must be.
        """
        self.finish()
        if self._copier:
            self._copier.require()
        self._engine.check_copies(step)
        self.check_space()
        fragments = self._engine.fragments
        counts = {"optimizer_steps": fragments.optimizer_steps, "births": fragments.births}
        state = state.model_copy(update=counts)
        partial = self._store.folder / f".{tag_of(step)}.partial"
        self._board.begin()
        self._content = _Content(partial, step, state, eval_loss)
        self._on_rank_0(self._begin)
        aside = self._engine.config.checkpoint.asynchronous and self._has_memory()
        tensors = {
            fragment_key(key, fragment.start, fragment.name): tensor.to("cpu", copy=aside)
            for fragment in fragments.owned()
            for key, tensor in fragment.states.items()
        }
        self._thread = threading.Thread(target=self._write, args=(partial, tensors), daemon=True)
        self._thread.start()
        if not aside:
            self._thread.join()

    def poll(self) -> None:
        """Completes the checkpoint if every rank has written its part.

        Costs nothing but on rank 0 while one is being written. What fails is raised by `finish`.
        """
        if self._rank or self._content is None:
            return
        if self._board.is_full():
            self._complete(self._board.read())

    def finish(self) -> None:
        """Waits until the checkpoint that is being written is complete.

        Raises:
            Failure: it could not be written; every rank raises it.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._raise_everywhere()
        if self._rank == 0 and self._content is not None:
            self._complete(self._board.read())
        self._raise_everywhere()
        self._content = None
        self._board.clear()
        largest(0)  # rank 0 may end now, and with it the store

    def settle(self) -> None:
        """Waits until nothing is being written or sent. Every rank calls it.

        Raises:
            Failure: as of `finish`.
        """
        self.finish()
        if self._copier:
            self._copier.settle(gives_up=True)

    def _open(self) -> None:
        self._store.folder.mkdir(parents=True, exist_ok=True)
        self._store.clean()
        self._identity = _folder_identity(self._store.folder)

    def _free_bytes(self) -> int:
        if _folder_identity(self._store.folder) != self._identity:
            raise OSError(
                "it is another folder than when the run started: moved away, or its file system "
                "mounted or unmounted"
            )
        return shutil.disk_usage(self._store.folder).free

    def _begin(self) -> None:
        shutil.rmtree(self._content.partial, ignore_errors=True)
        self._content.partial.mkdir()

    def _on_rank_0(self, work: Callable[[], Any]) -> Any:
        """What rank 0's files give, on every rank.

        Raises:
            Failure: they cannot be read or written; every rank raises it.
        """
        found, error = None, None
        if self._rank == 0:
            try:
                found = work()
            except OSError as e:
                error = _text(e)
        found, error = of_rank_0((found, error))
        if error:
            raise self._failure(0, error)
        return found

    def _raise_everywhere(self) -> None:
        failed = first_of_all(_text(self._error) if self._error else None)
        if failed:
            raise self._failure(*failed)

    def _failure(self, rank: int, text: str) -> Failure:
        return Failure(
            f"rank {rank} could not write the checkpoint in {self._store.folder} ({text}); "
            f"mend that and start the run again: it resumes from its last checkpoint."
        )

    def _write(self, partial: Path, tensors: dict[str, Tensor]) -> None:
        """On the thread."""
        try:
            file = partial / f"rank_{self._rank:05d}.safetensors"
            save_file(tensors, file)
            tensors.clear()
            # Readable by whoever may read the folder; the library makes it private.
            file.chmod(partial.stat().st_mode & 0o666)
            sync_file(file)
            # The replicas of a pipe stage hold parts of the same parameters.
            shapes = self._engine.fragments.shapes if self._engine.replica == 0 else {}
            self._board.leave(describe(file), shapes)
        except (OSError, SafetensorError, dist.DistError) as e:
            self._error = e

    def _complete(self, written: Iterable[tuple[File, Shapes]]) -> None:
        """On rank 0, from what every rank wrote."""
        content, self._content = self._content, None
        files, parameters = {}, {}
        for rank, (file, shapes) in enumerate(written):
            files[f"rank_{rank:05d}.safetensors"] = file
            parameters |= shapes
        whole = Index(
            step=content.step,
            layout=self._engine.layout,
            parameters=parameters,
            files=files,
            state=content.state,
            eval_loss=content.eval_loss,
        )
        try:
            replace_text(content.partial / index.FILE, whole.to_json())
            final = self._store.path(content.step)
            if final.exists():  # of a run that went back
                self._store.remove(content.step)
            os.replace(content.partial, final)
            sync_folder(self._store.folder)
            if self._copier:
                self._copier.offer(content.step)
            held = self._copier.held if self._copier else ()
            self._store.keep(content.step, self._engine.config.checkpoint, held)
        except OSError as e:
            self._error = e

    def _has_memory(self) -> bool:
        """Whether this host can hold what its ranks copy, and as much again for training."""
        return psutil.virtual_memory().available > 2 * self._host_bytes


def _folder_identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _sums(everyone: list[tuple[str, int]]) -> Iterator[tuple[int, int]]:
    """Of every rank the bytes of its host, and of all.

    Args:
        everyone: of every rank the host and its bytes.
    """
    of_host: Counter[str] = Counter()
    for host, num_bytes in everyone:
        of_host[host] += num_bytes
    total = of_host.total()
    return ((of_host[host], total) for host, _ in everyone)
