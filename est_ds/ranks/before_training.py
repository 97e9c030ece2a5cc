"""A notice of pre-emption before the first step ends all processes at once: nothing is to be saved.

The main thread may then wait for other processes where no signal handler runs, as in a name look-up
or in gloo. So a thread hears the notice, tells the store on rank 0, and ends the process; another
one hears there what other processes were told. Whether all train or all end is decided at the store
by whoever comes first, the notice or the first step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from est_ds.ranks import preempt
from est_ds.ranks.board import look_every_s, within
from est_ds.ranks.meeting import CALL_S
from est_ds.ranks.world import World

KEY = "est_ds/before_training"
BEGUN, ENDS = "begun", "ends"
EVERY_S = 0.2  # between two looks at the store where few ranks look
TELL_S = 1.0  # for the others to hear it, before they lose this process; and to find the store


class BeforeTraining:
    """To be used in a `with` around a training, on the main thread.

    Notices count from `preempt.heed_signals` on.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._look_every_s = look_every_s(EVERY_S, world.size)
        self._store: dist.Store | None = None
        self._reached = threading.Event()
        self._over = threading.Event()
        self._ending = threading.Lock()

    def __enter__(self) -> BeforeTraining:
        source, self._sink = os.pipe()
        os.set_blocking(self._sink, False)
        self._former = signal.set_wakeup_fd(self._sink, warn_on_full_buffer=False)
        threading.Thread(target=self._hear_signals, args=(source,), daemon=True).start()
        threading.Thread(target=self._hear_others, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._reached.set()
        signal.set_wakeup_fd(self._former)
        os.close(self._sink)

    def reached(self, store: dist.Store) -> None:
        """Takes the store on rank 0, over a connection that nobody else waits on."""
        self._store = store.clone()
        self._reached.set()

    def begin(self) -> None:
        """Begins to train: from now on a notice is obeyed after a step. Every process calls it.

        It does not return if a notice came first.
        """
        if self._decide(BEGUN) == ENDS:
            threading.Event().wait()  # a thread is about to end the process
        self._over.set()

    def _hear_signals(self, source: int) -> None:
        if preempt.received():  # before this began
            self._obey()
        while numbers := os.read(source, 64):
            if any(number in numbers for number in preempt.SIGNALS):
                self._obey()
        os.close(source)

    def _obey(self) -> None:
        """Ends the process, unless training has begun."""
        if self._over.is_set():
            return
        answer = None
        if self._reached.wait(TELL_S):  # else it has nobody to tell
            with suppress(OSError, dist.DistError):  # no answer
                answer = within(CALL_S, lambda: self._decide(ENDS))
        if answer != BEGUN:
            self._end()

    def _hear_others(self) -> None:
        self._reached.wait()
        try:
            while not self._over.wait(self._look_every_s):
                if self._store.check([KEY]) and self._store.get(KEY).decode() == ENDS:
                    self._end()
        except (OSError, dist.DistError):
            pass  # rank 0 has gone, which ends this process in other ways

    def _decide(self, what: str) -> str:
        """What was decided: this, or what came first."""
        return self._store.compare_set(KEY, "", what).decode()

    def _end(self) -> None:
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread is at it
        if self._world.size > 1:
            tell_s = TELL_S + self._look_every_s - EVERY_S
            time.sleep(tell_s * (2 if self._world.is_first else 1))  # rank 0 takes the store along
        preempt.end("pre-empted before the first step" if self._world.local_rank == 0 else None)
