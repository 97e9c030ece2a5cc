"""A file that one process at a time may hold."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import TextIO

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def hold(file: Path) -> TextIO:
    """Holds a file, made with its folder, until it is closed or the process ends.

    On a shared file system without locks nothing is guarded.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in NO_LOCKS:
            lock.close()
            raise
    return lock
