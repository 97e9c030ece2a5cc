"""Ends a run that has come to a halt, on every host, and says which process is the cause.

A process that dies or hangs leaves the others waiting in a reduction, with NCCL for ever. Each
process watches its own progress on a thread and tells it to the store on rank 0. The first that
made no progress for the limit, or failed, raises the alarm; all then report what they are at. The
one that raised it gathers the reports, and leaves its verdict for all, who exit. Nobody needs the
store to exit: whoever cannot reach it ends by its own clock.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Container
from contextlib import suppress
from types import TracebackType

import psutil
import torch.distributed as dist

from est_ds.errors import Failure, LocalFailure, UserError
from est_ds.ranks.board import look_every_s, present, wait_for
from est_ds.ranks.meeting import Meeting, OtherStart, host_of
from est_ds.ranks.preempt import Preempted
from est_ds.ranks.verdict import SHOWN, Record, is_broken_connection, verdict, where_main_is
from est_ds.ranks.world import World

ALARM = "est_ds/alarm"
VERDICT = "est_ds/verdict"
EVERY_S = 1.0  # between two looks at the own progress, and at the store where few ranks look
ANSWER_S = 5.0  # for the reports of all, after they have heard the alarm
REQUESTS = 4  # of a look


class Watchdog:
    """To be used in a `with` around everything that the processes do together.

    Args:
        limit_s: how long a process may go without a `mark`.
    """

    def __init__(self, meeting: Meeting, world: World, limit_s: float) -> None:
        self._meeting, self._world, self._limit_s = meeting, world, limit_s
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._concluding = threading.Lock()
        self._alarm: str | None = None
        self._last: dict[int, Record] = {}
        self._heard = time.monotonic()  # of the store
        self._lost = False  # the store, and with it rank 0
        self._text: str | None = None  # the verdict
        self._look_every_s = look_every_s(EVERY_S, REQUESTS * world.size)
        self.mark(0, "starting")

    def mark(self, done: int, doing: str) -> None:
        """Says that the process goes on: it has done `done` steps and begins to do `doing`."""
        self._done, self._doing, self._since = done, doing, time.monotonic()
        # For code that holds the interpreter, where no thread can run.
        faulthandler.dump_traceback_later(1.5 * self._limit_s + 30, exit=True)

    def go_on(self, doing: str) -> None:
        """As `mark`, with as many steps done as before."""
        self.mark(self._done, doing)

    def __enter__(self) -> Watchdog:
        for work in (self._watch, self._talk):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What every process raises alike needs no alarm.
        alike = (UserError, Failure, Preempted, KeyboardInterrupt, SystemExit)
        if error is None or isinstance(error, alike):
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()
            return
        if is_broken_connection(error):
            self._conclude("the connection to a process broke.")
        said = " ".join(str(error).split())[:500]
        # A file that cannot be read or written is no fault of the code's, and the error names it.
        if not isinstance(error, LocalFailure):
            said = f"{type(error).__name__}: {said}"
            if not (isinstance(error, OSError) and error.filename):
                traceback.print_exception(error)
        self._conclude(f"rank {self._world.rank} on {self._host} failed.", said)

    @property
    def _host(self) -> str:
        return self._meeting.host

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            now = time.monotonic()
            if self._alarm is not None:
                self._conclude(self._alarm)
            elif now - self._since > self._limit_s:
                self._conclude(f"no progress for {self._limit_s:.0f} s (watchdog.limit_s).")
            elif self._world.size > 1 and now - self._heard > self._limit_s:
                self._conclude(f"rank 0 has not been reached for {self._limit_s:.0f} s.")

    def _talk(self) -> None:
        """Tells the store of this process, and listens for the alarm."""
        board = None
        while not self._ended.wait(self._look_every_s):
            try:
                board = board or _Board(self._meeting.connect(), self._world)
                board.beat(self._record())
                self._alarm = board.alarm()
                self._last |= board.beats([0])
                self._heard = time.monotonic()
            except OtherStart:
                self._alarm = "rank 0 has gone, and the run was started again."
            except (OSError, dist.DistError):
                board = None

    def _record(self, error: str | None = None) -> Record:
        # If it concludes itself, it failed, or waited for others when a connection broke.
        where = where_main_is(self._main) if threading.get_ident() != self._main else None
        return Record(self._done, self._doing, where, error)

    def _conclude(self, reason: str, error: str | None = None) -> None:
        """Gathers what all are at, says it, and ends this process."""
        if not self._concluding.acquire(blocking=False):
            threading.Event().wait()  # another thread is about to end the process
        try:
            reports = {self._world.rank: self._record(error)}
            # On a thread: no answer may come from the store, nor an error.
            gathering = threading.Thread(target=self._gather, args=(reason, reports), daemon=True)
            gathering.start()
            gathering.join(2 * self._answer_s)
            self._lost |= gathering.is_alive()
            if self._speaks(list(reports)):
                with suppress(OSError):  # nobody reads it any more
                    print(self._said(reason, dict(reports)), file=sys.stderr, flush=True)
            self._kill_neighbours(self._missing(reports))
            if self._world.is_first:
                time.sleep(2 * self._look_every_s)  # the others read from the store until then
            sys.stdout.flush()
        finally:  # whatever fails here
            os._exit(1)

    @property
    def _answer_s(self) -> float:
        return ANSWER_S + self._look_every_s - EVERY_S

    def _said(self, reason: str, reports: dict[int, Record]) -> str:
        """The verdict; of what is known here, where nobody has left one."""
        if self._text is not None:
            return self._text
        hosts = {0: self._meeting.first_host} | dict.fromkeys(self._meeting.near, self._host)

        def host_of(rank: int) -> str:
            return hosts.get(rank, "its host")

        missing = self._missing(reports)
        return verdict(self._alarm or reason, host_of, reports, missing, self._last)

    def _missing(self, reports: Container[int]) -> list[int]:
        """The ranks that do not answer, of those of which this process knows."""
        if self._lost:  # of the others nothing is known
            return [] if self._world.is_first else [0]
        return [rank for rank in self._meeting.near if rank not in reports]

    def _speaks(self, answering: list[int]) -> bool:
        """Whether this is the process of its host that says what all know."""
        if self._lost:
            return self._world.local_rank == 0 or self._world.rank == 1
        near = [rank for rank in answering if rank in self._meeting.near]
        return self._world.rank == min(near)

    def _gather(self, reason: str, reports: dict[int, Record]) -> None:
        """Takes in what others are at: the one that raised the alarm of all, the others of their
        host, and the verdict."""
        try:
            board = _Board(self._meeting.connect(), self._world)
            board.report(reports[self._world.rank])
            gathers = board.raise_alarm(reason)
            of = range(self._world.size) if gathers else self._meeting.near
            deadline = time.monotonic() + self._answer_s
            while len(reports) < len(of) and time.monotonic() < deadline:
                reports |= board.reports([rank for rank in of if rank not in reports])
                time.sleep(0.2)
            missing = [rank for rank in of if rank not in reports]
            self._last |= board.beats(missing[:SHOWN])
            self._alarm = board.alarm()
            if gathers:
                self._text = verdict(
                    self._alarm or reason, board.host_of, dict(reports), missing, self._last
                )
                board.leave_verdict(self._text)
            else:
                self._text = board.verdict(self._world.size, deadline)
        except (OSError, dist.DistError):
            self._lost = self._text is None

    def _kill_neighbours(self, ranks: list[int]) -> None:
        """Ends those of the same launcher, which waits 30 s before it does."""
        for rank in self._meeting.near.keys() & ranks:
            with suppress(psutil.Error):  # it has ended
                process = psutil.Process(self._meeting.near[rank])
                if process.ppid() == os.getppid():
                    process.kill()


class _Board:
    """What stands on the store."""

    def __init__(self, store: dist.Store, world: World) -> None:
        self._store, self._rank = store, world.rank

    def beat(self, record: Record) -> None:
        self._store.set(f"est_ds/beat/{self._rank}", json.dumps(record.as_dict()))

    def beats(self, ranks: list[int]) -> dict[int, Record]:
        return self._read("beat", ranks)

    def report(self, record: Record) -> None:
        self._store.set(f"est_ds/report/{self._rank}", json.dumps(record.as_dict()))

    def reports(self, ranks: list[int]) -> dict[int, Record]:
        return self._read("report", ranks)

    def host_of(self, rank: int) -> str:
        return host_of(self._store, rank)

    def raise_alarm(self, reason: str) -> bool:
        """The first reason stays; whether it is this rank's."""
        own = f"{self._rank} {reason}"
        return self._store.compare_set(ALARM, "", own).decode() == own

    def alarm(self) -> str | None:
        if not self._store.check([ALARM]):
            return None
        return self._store.get(ALARM).decode().partition(" ")[2]

    def leave_verdict(self, text: str) -> None:
        self._store.set(VERDICT, text)
        self._store.check([VERDICT])  # it has come there

    def verdict(self, num_ranks: int, until: float) -> str | None:
        """Waits for the verdict; None if none comes."""
        found = wait_for(self._store, VERDICT, num_ranks, until + 1.0)
        return self._store.get(VERDICT).decode() if found else None

    def _read(self, kind: str, ranks: list[int]) -> dict[int, Record]:
        keys = {f"est_ds/{kind}/{rank}": rank for rank in ranks}
        found = present(self._store, list(keys))
        return {keys[key]: Record(**json.loads(text)) for key, text in found.items()}
