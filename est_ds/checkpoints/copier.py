"""Copies a run's checkpoints to a bucket while it trains.

Rank 0 says on the store which checkpoint is to be copied; a thread of every rank sends its share of
the files, from disk, and answers there. Once all have, rank 0 makes the copy whole. The training
waits for nothing of this, unless `checkpoint.copy_required` says so.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist

from est_ds.checkpoints.bucket import Bucket
from est_ds.checkpoints.index import FILE, Damaged, Index, read_index
from est_ds.checkpoints.store import Store, tag_of
from est_ds.config.sections import Checkpoint as Settings
from est_ds.data.remote import RemoteError
from est_ds.disk import File
from est_ds.errors import Failure, gigabytes
from est_ds.ranks.board import AT_ONCE, look_every_s, read_all
from est_ds.ranks.gather import of_rank_0

EVERY_S = 0.5  # between two looks at the store
FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 300.0  # before a copy is tried again, doubled every time
LATE_S = 30.0  # for a shared file system to show what another host has written


class _Ended(Exception):
    """The training is over, and so is the copy under way."""


class CopyBoard:
    """What the ranks tell each other on the store on rank 0. Whatever it does may raise
    `dist.DistError`, when that has gone.

    Args:
        connect: makes a connection to it.
        name: of this training; one store may see several.
    """

    def __init__(self, connect: Callable[[], dist.Store], name: str) -> None:
        self._connect, self._store, self._name = connect, connect(), f"est_ds/copy/{name}"
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self._missing: list[str] = []  # answers, on rank 0

    def connect(self) -> None:
        """Makes the connection anew: a lost one does not come back by itself."""
        self._store = self._connect()

    def order(self, number: int, step: int) -> None:
        """Asks every rank to send its files of a checkpoint."""
        self._missing = self._keys(number)
        self._store.set(f"{self._name}/order", json.dumps([number, step]))

    def ordered(self) -> tuple[int, int]:
        """Number and step of the last order; number 0: none yet."""
        key = f"{self._name}/order"
        return tuple(json.loads(self._store.get(key))) if self._store.check([key]) else (0, 0)

    def answer(self, number: int, text: str) -> None:
        """Says how it went: nothing if all is well."""
        self._store.set(self._key(number, self.rank), text or " ")

    def answers(self, number: int) -> list[str] | None:
        """What all ranks have answered to the last order; None while some have not. Mostly one
        request."""
        while self._missing and self._store.check(self._missing[:AT_ONCE]):
            del self._missing[:AT_ONCE]
        if self._missing:
            return None
        keys = self._keys(number)
        texts = [text.decode().strip() for text in read_all(self._store, keys)]
        for key in keys:
            self._store.delete_key(key)
        return texts

    def end(self) -> None:
        """Says that nothing more will be copied."""
        self._store.set(f"{self._name}/end", "1")

    def has_ended(self) -> bool:
        return self._store.check([f"{self._name}/end"])

    def _key(self, number: int, rank: int) -> str:
        return f"{self._name}/{number}/{rank}"

    def _keys(self, number: int) -> list[str]:
        return [self._key(number, rank) for rank in range(self.num_ranks)]


@dataclass
class _Status:
    """Of the copies, on rank 0.

    Attributes:
        wanted: the step to be copied next.
        busy: the one that is being copied.
        error: why the last try failed.
    """

    wanted: int | None = None
    busy: int | None = None
    error: str | None = None

    @property
    def is_idle(self) -> bool:
        return self.wanted is None and self.busy is None


class Copier:
    """Copies checkpoints in the background; every rank has one. To be used in a `with`.

    Args:
        store: the checkpoints.
        settings: with a `copy_to`.
        board: where the ranks meet.
        note: shows a line.
        goes_on: called while the main thread waits.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        board: CopyBoard,
        note: Callable[[str], None],
        goes_on: Callable[[], None],
    ) -> None:
        self._store, self._settings, self._board = store, settings, board
        self._note, self._goes_on = note, goes_on
        self._bucket = Bucket(settings.copy_to)
        self._is_first = board.rank == 0
        self._status, self._changed = _Status(), threading.Condition()
        self._number = 0
        self._sent: dict[str, File] = {}  # of the checkpoint of `_sending`
        self._sending: Index | None = None
        self._over = threading.Event()
        work = self._lead if self._is_first else self._follow
        self._thread = threading.Thread(target=self._quietly, args=(work,), daemon=True)

    def __enter__(self) -> Copier:
        if self._is_first:
            self._status.wanted = self._store.latest  # which a killed run may have left uncopied
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self._over.set()
        with self._changed:
            self._changed.notify_all()

    def offer(self, step: int) -> None:
        """Asks for a copy of a checkpoint, on rank 0. One that still waits for its turn is left
        out: the newest counts."""
        with self._changed:
            self._status.wanted = step
            self._changed.notify_all()

    @property
    def held(self) -> set[int]:
        """Steps that must stay on disk, on rank 0."""
        with self._changed:
            return {s for s in (self._status.wanted, self._status.busy) if s is not None}

    def settle(self, gives_up: bool = False) -> str | None:
        """Waits until nothing is to be copied, or `copy_wait_s` are over. Every rank calls it.

        Args:
            gives_up: it does not wait for a copy that has failed to be tried again.

        Returns:
            What is still not copied, and why; None if all is.
        """
        deadline = time.monotonic() + self._settings.copy_limit_s
        while True:
            over = time.monotonic() > deadline or (gives_up and self._status.error is not None)
            left, over = of_rank_0((self._left, over))
            if left is None or over:
                return left
            self._goes_on()
            time.sleep(EVERY_S)

    def require(self) -> None:
        """With `copy_required` waits for the copies. Every rank calls it.

        Raises:
            Failure: they are not done in time; every rank raises it.
        """
        if self._settings.copy_required and (left := self.settle()):
            raise Failure(
                f"{left}, and checkpoint.copy_required=true; mend that and start the run again: it "
                f"resumes from its last checkpoint."
            )

    def close(self, limit_s: float | None = None) -> None:
        """Waits for the copies, and ends the thread. Every rank calls it, and none waits for
        another but by the store: some may have gone.

        Args:
            limit_s: for how long, if the last try did not fail; `copy_wait_s` if None, and then in
                any case.
        """
        gives_up = limit_s is not None
        limit_s = self._settings.copy_limit_s if limit_s is None else limit_s
        deadline = time.monotonic() + limit_s + (0.0 if self._is_first else LATE_S)
        with suppress(dist.DistError, OSError):
            while time.monotonic() < deadline and self._thread.is_alive():
                if self._is_first:
                    if self._left is None or (gives_up and self._status.error):
                        break
                elif self._board.has_ended():
                    break
                self._goes_on()
                time.sleep(look_every_s(EVERY_S / 5, self._board.num_ranks))
            if self._is_first:
                if left := self._left:
                    self._note(f"warning: {left}")
                elif (latest := self._store.latest) is not None:
                    self._store.keep(latest, self._settings)  # what was held
                self._board.end()
        self.__exit__(None)

    @property
    def _left(self) -> str | None:
        """What is not copied, and why, on rank 0; None if nothing is left, and elsewhere."""
        with self._changed:
            status = self._status
            if not self._is_first or status.is_idle:
                return None
            step = status.busy if status.wanted is None else status.wanted
            why = status.error or "it takes longer than that"
        waited = f"within {self._settings.copy_limit_s:.0f} s (checkpoint.copy_wait_s)"
        return f"checkpoint {step} could not be copied {waited}: {why}"

    def _quietly(self, work: Callable[[], None]) -> None:
        """On the thread."""
        with suppress(_Ended, dist.DistError):  # the store ends with rank 0
            work()

    def _lead(self) -> None:
        """Has what is wanted copied, on rank 0."""
        while (step := self._next()) is not None:
            wait_s = FIRST_WAIT_S
            while (error := self._try(step)) is not None:
                with self._changed:
                    self._status.error = error
                    self._note(
                        f"warning: checkpoint {step} could not be copied ({error}); trying again "
                        f"in {wait_s:.0f} s"
                    )
                    self._changed.wait_for(self._is_disturbed, wait_s)
                    if self._status.wanted is not None:
                        break  # for a newer one
                if self._over.is_set():
                    return
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _is_disturbed(self) -> bool:
        return self._over.is_set() or self._status.wanted is not None

    def _next(self) -> int | None:
        """Waits for a checkpoint to copy; None at the end."""
        with self._changed:
            self._status.busy = None
            self._changed.wait_for(self._is_disturbed)
            if self._over.is_set():
                return None
            self._status.busy, self._status.wanted = self._status.wanted, None
            return self._status.busy

    def _try(self, step: int) -> str | None:
        """Copies a checkpoint; returns what went wrong."""
        began = time.monotonic()
        try:
            index = self._copy(step)
        except (RemoteError, OSError, Damaged) as e:
            return str(e)
        with self._changed:
            self._status.error = None
        if index is None:
            return None
        size = gigabytes(sum(file.bytes for file in index.files.values()))
        took = time.monotonic() - began
        self._note(f"checkpoint {step} copied to {self._bucket.url} ({size}, {took:.0f} s)")
        try:
            self._bucket.keep(step, self._settings)
        except RemoteError as e:
            self._note(f"warning: older copies could not be removed ({e})")
        return None

    def _copy(self, step: int) -> Index | None:
        """Returns what was copied; None if the bucket has it."""
        index = read_index(self._store.path(step))
        if self._bucket.index(step) == index:
            return None
        self._bucket.begin(step)
        self._number += 1
        self._board.order(self._number, step)
        self._board.answer(self._number, self._send(step))
        while (texts := self._board.answers(self._number)) is None:
            self._check_over()
            time.sleep(EVERY_S / 5)
        for rank, text in enumerate(texts):
            if text:
                raise RemoteError(f"rank {rank}: {text}")
        if read_index(self._store.path(step)) != index:
            raise RemoteError("it was written anew meanwhile")
        self._bucket.complete(index, self._store.folder.parent, self._check_over)
        return index

    def _follow(self) -> None:
        """Does what rank 0 asks for, on the others."""
        done = 0
        every_s = look_every_s(EVERY_S, 2 * self._board.num_ranks)  # a look may be two requests
        while not self._over.wait(every_s):
            try:
                number, step = self._board.ordered()
                if number > done:
                    self._board.answer(number, self._send(step))
                    done = number
            except (dist.DistError, OSError):
                with suppress(dist.DistError, OSError):
                    self._board.connect()

    def _send(self, step: int) -> str:
        """Sends this rank's share of a checkpoint's files; returns what went wrong."""
        try:
            folder, index = self._store.path(step), self._index(step)
            if self._sending != index:
                self._sending, self._sent = index, {}
            names = sorted(index.files)[self._board.rank :: self._board.num_ranks]
            there = self._bucket.sizes(tag_of(step)) if self._sent else {}
            for name in names:
                file = index.files[name]
                if self._sent.get(name) == file and there.get(name) == file.bytes:
                    continue  # by a try that failed for other reasons
                sent = self._bucket.send(folder / name, f"{tag_of(step)}/{name}", self._check_over)
                if sent != file:
                    return f"{folder / name} is not what was written (its sha256 differs)"
                self._sent[name] = sent
            return ""
        except _Ended:
            raise
        except Exception as e:  # rank 0 waits for the answer
            return str(e) if isinstance(e, RemoteError) else f"{type(e).__name__}: {e}"

    def _index(self, step: int) -> Index:
        """The checkpoint's contents, which another host may see late."""
        deadline = time.monotonic() + LATE_S
        while not (self._store.path(step) / FILE).exists() and time.monotonic() < deadline:
            self._check_over()
            time.sleep(EVERY_S)
        return read_index(self._store.path(step))

    def _check_over(self) -> None:
        if self._over.is_set():
            raise _Ended
