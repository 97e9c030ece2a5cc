"""Sees to it that no host trains on when `est-ds --hostfile` is killed and can do nothing itself.

The orphans' keeper is a process in a session of its own, at the other end of a pipe: when the pipe
closes without the word, `est-ds` is gone, and it kills the launcher and what was started on the
hosts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

from est_ds.launch import ssh

DONE = "done"
ROUNDS, BETWEEN_S = 3, 2.0  # a host may be about to start its processes


class Keeper:
    """To be used in a `with` around one start of processes.

    Args:
        start: its name, which stands on the command line of every process.
    """

    def __init__(self, start: str, hosts: Iterable[str]) -> None:
        self._command = [sys.executable, "-m", "est_ds.launch.orphans", start, *hosts]

    def __enter__(self) -> Keeper:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            # Not this process's: who reads them would wait for the keeper too.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        return self

    def end_too(self, launcher: int) -> None:
        """Says which process group is to end too."""
        self._say(str(launcher))

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self._say(DONE)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _say(self, word: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it was killed: nobody watches, and all goes on
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()


def main(start: str, hosts: list[str]) -> None:
    """Waits until `est-ds` has ended or died."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    words = sys.stdin.read().split()
    if DONE in words:
        return
    if words:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(words[0]), signal.SIGKILL)
    for round in range(ROUNDS):
        time.sleep(BETWEEN_S if round else 0.0)
        ssh.kill(hosts, start)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
