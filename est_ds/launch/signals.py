"""Signals that `est-ds` gets while it starts training processes, or waits to start them again."""

from __future__ import annotations

import signal
import time

from est_ds.ranks import preempt


class Signals:
    """Notes signals instead of dying of them; to be used in a `with`, on the main thread.

    Attributes:
        noticed: whether a notice of pre-emption has come.
        ended_by: SIGINT or SIGHUP, once one has come.
        end: called at once by each of these two.
    """

    def __init__(self) -> None:
        self.noticed = False
        self.ended_by: int | None = None
        self.end = lambda: None

    def __enter__(self) -> Signals:
        handlers = {number: self._note_notice for number in preempt.SIGNALS}
        handlers |= {number: self._note_end for number in (signal.SIGINT, signal.SIGHUP)}
        self._former = {
            number: signal.signal(number, handler)
            for number, handler in handlers.items()
            if signal.getsignal(number) != signal.SIG_IGN  # as under nohup
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @property
    def code(self) -> int | None:
        """The exit code that they ask for while nothing runs; None: no signal has come."""
        if self.ended_by is not None:
            return 128 + self.ended_by
        return preempt.EXIT_CODE if self.noticed else None

    def wait(self, limit_s: float) -> None:
        """Waits that long, or until a signal comes."""
        end = time.monotonic() + limit_s
        while self.code is None and time.monotonic() < end:
            time.sleep(0.1)

    def _note_notice(self, number: int, frame: object) -> None:
        self.noticed = True

    def _note_end(self, number: int, frame: object) -> None:
        self.ended_by = number
        self.end()
