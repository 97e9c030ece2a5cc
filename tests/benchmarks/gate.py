"""Lets one process step another: each line on its standard input is one step.

A contender of dense.py runs its own training loop, whoever wrote it, over `gated(...)` batches.
The loop asks for its next batch when it is done with the one before, so that whatever it does in
between (its own bookkeeping, logging, optimizer) counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def own_output() -> int:
    """Keeps the pipe to the parent for `gated`; what libraries print goes to standard error."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    return pipe


def gated(batches: Iterator[Tensor], pipe: int) -> Iterator[Tensor]:
    """Hands on a batch whenever the parent says so, and tells it the seconds of the step before.

    Ends when the parent closes the input. With several threads the process's clock would add them
    up, so the one on the wall counts.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = None
    for batch in batches:
        if began is not None:
            os.write(pipe, b"%.9f\n" % (clock() - began))
        if not sys.stdin.readline():
            os._exit(0)  # out of whatever loop this is in
        began = clock()
        yield batch


class Contender:
    """A process that trains step by step.

    Args:
        command: arguments of the Python that runs it.
    """

    def __init__(self, command: list[str | Path], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if "VERBOSE" not in os.environ else None,
            text=True,
            bufsize=1,
        )

    def step(self, _: int) -> float:
        """Lets it make a step; the seconds that it took."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise RuntimeError(f"{self._process.args[1:]} ended:\n{errors}")
        return float(line)

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
