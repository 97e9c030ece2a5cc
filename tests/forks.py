"""Processes that are forked from one that has torch, transformers and DeepSpeed loaded.

To load them takes five seconds of a processor in every process, which is most of what a small
training costs. The server is the standard library's: it loads `preload`, starts no thread, opens no
device and joins no process group, and forks whenever a process is asked for. The processes of one
server share their seed of string hashes; tests of the real command line start interpreters anew.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def fork(
    target: Callable[..., None],
    arguments: tuple,
    streams: tuple[Path, Path],
    cwd: Path,
    environment: dict[str, str],
) -> ForkServerProcess:
    """Starts `target(*arguments)` in a process of its own, with nothing of this one's state.

    Args:
        streams: files that take standard output and standard error; they may be the same.
        environment: all of it.
    """
    given = (target, arguments, streams, cwd, environment)
    process = _server().Process(target=_run, args=given, daemon=True)
    process.start()
    return process


def wait(processes: list[ForkServerProcess], timeout_s: float) -> list[int]:
    """Returns the exit codes, -n after signal n.

    Raises:
        TimeoutExpired: they have not all ended; then none is left.
    """
    deadline = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(str(process), timeout_s)
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


@cache
def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    with _environment(PYTHONPATH=str(TESTS), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu"):
        ensure_running()
    return context


@contextmanager
def _environment(**changed: str):
    before = dict(os.environ)
    os.environ.update(changed)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(target, arguments, streams, cwd, environment) -> None:
    if "preload" not in sys.modules:  # the server passes over an import that fails
        import_module("preload")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, file in enumerate(streams, 1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    target(*arguments)
