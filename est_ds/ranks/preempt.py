"""Pre-emption: after a notice to any process all of them stop at the same step.

The notice is SIGTERM or SIGUSR1. A handler only notes it: the step under way ends as ever, then the
processes agree, save, and exit with `EXIT_CODE`. Before the first step they end at once
(`engine.before_training`).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

# EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again. It is no signal's 128 + n.
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: list[int] = []


class Preempted(Exception):
    """The run was saved and ends before its last step; every process raises it."""

    def __init__(self, step: int) -> None:
        super().__init__(f"pre-empted: saved after step {step}; start the run again to go on.")


def heed_signals() -> None:
    """Notes the signals from now on, instead of dying of them."""
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: _received.append(received))


def end_on_signals() -> None:
    """Ends this process at the first of the signals, while it has started nothing."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: end("pre-empted before anything was started"))


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """Ends by SystemExit at SIGTERM and SIGHUP, so that what is open is closed and temporary files
    go; the exit code is a shell's of a process that died of the signal."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    former = [signal.signal(n, lambda received, _: sys.exit(128 + received)) for n in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, former):
            signal.signal(number, handler)


def received() -> bool:
    """Whether this process has got a notice."""
    return bool(_received)


def end(what: str | None) -> NoReturn:
    """Ends this process at once, from any thread: there is nothing to save.

    Args:
        what: to be said; None: another process says it.
    """
    with suppress(OSError):  # nobody reads it
        if what:  # not by print, in the midst of which a handler may be called
            os.write(1, f"est-ds: {what}; start it again to go on.\n".encode())
    os._exit(EXIT_CODE)


def noticed() -> bool:
    """Whether any process has got a notice; every process asks together and gets one answer."""
    import torch  # here, so that signals are heeded before the second that it takes
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(float(bool(_received)), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())
