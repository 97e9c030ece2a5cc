"""What ends a command with one clear line."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# What of a message may be a key: in URLs, and values of these variables.
_SECRETS = (
    (re.compile(r"//[^/@\s]+@"), "//...@"),
    (re.compile(r"(?i)([\w-]*(?:signature|credential|token|accesskeyid)=)[^&\s\"']+"), r"\1..."),
)
_SECRET_NAME = re.compile(r"KEY|TOKEN(?!IZER)|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


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


def how_to_install(extra: str) -> str:
    """Returns the commands that install an optional part of the package."""
    return f"pip install 'est_ds[{extra}]', or in a checkout pip install -e '.[{extra}]'"


def error_line(error: BaseException, *secrets: str) -> str:
    """Returns what a library raised, with its type, `without_keys`."""
    return f"{type(error).__name__}: {without_keys(str(error), *secrets)}"


def without_keys(text: str, *secrets: str) -> str:
    """Returns a text on one line, at most 300 characters of it, without what may give access: what
    stands before the @ of URLs, their signatures, values of secret variables, and `secrets`."""
    text = " ".join(text.split())
    for pattern, kept in _SECRETS:
        text = pattern.sub(kept, text)
    named = [v for n, v in os.environ.items() if len(v) >= 8 and _names_secret(n, v)]
    for value in (*secrets, *named):
        text = text.replace(value, "...")
    return text[:300]


def is_secret(name: str, value: str) -> bool:
    """Whether a variable of the environment may give access: its name says so, or its value, which
    is a URL with a user, or JSON that names a key (as `FSSPEC_S3` may)."""
    return (
        _names_secret(name, value)
        or re.search(r"://[^/@\s]+@", value) is not None
        or (value.lstrip().startswith("{") and _SECRET_NAME.search(value) is not None)
    )


def _names_secret(name: str, value: str) -> bool:
    """Paths of files with secrets are none."""
    return _SECRET_NAME.search(name) is not None and not os.path.exists(value)


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
