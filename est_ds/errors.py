"""What ends a command with one clear line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Wrong input; the text names field, value, what is allowed and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Failure(RuntimeError):
    """The run cannot go on, though its input was right; every rank raises the same.

    The command line prints it once, without a traceback, and exits with code 1.
    """


class Diverged(Failure):
    """The run cannot go on because of what it computes: it would come to the same again.

    The command line exits with code 3.
    """


class LocalFailure(RuntimeError):
    """As `Failure`, but of this process alone: the watchdog tells the others, and ends all."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns the question with the nearest known word, and a space; nothing if none is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def gigabytes(num_bytes: float) -> str:
    """Returns a size as people read it: 1.5 GB."""
    return f"{num_bytes / 1e9:.3g} GB"


def amount(count: float) -> str:
    """A large number with a unit: 8.2 k, 369 k, 12.6 G."""
    for unit in ("", " k", " M", " G", " T"):
        if count < 999.5:
            break
        count /= 1000.0
    return f"{count:.3g}{unit}"


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Adds the path to an error of reading or writing that names none, as of an open file."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            e.filename = str(path)
        raise
