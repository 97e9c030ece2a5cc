"""Kinds of values that several sections of a run file hold."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, Field

SCHEMES = ("s3", "gs", "file")


def is_url(path: str) -> bool:
    """Whether a path is one in a bucket, not of this machine's files."""
    return "://" in path


def absolute(path: str) -> str:
    """A path that means the same in every working directory."""
    return path if is_url(path) else os.path.abspath(path)


def _bucket_url(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES or not rest.strip("/"):
        raise ValueError("write s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or file:///FOLDER")
    if any(sign in rest for sign in "@?#"):
        raise ValueError(
            "a URL has no @, ? or #: keys do not belong into a run file, but into the environment "
            "or the cloud's own files"
        )
    if scheme == "file" and not rest.startswith("/"):
        raise ValueError(f"file://{rest} is relative; write file:///FOLDER")
    return url.rstrip("/")


Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
# Of a file or folder. `~` and `$VARIABLE` in it are replaced when a run file is read.
PathText = Annotated[str, Field(min_length=1)]
# Of a folder in a bucket.
BucketUrl = Annotated[str, AfterValidator(_bucket_url)]
# Of a corpus or folder, here or in a bucket.
PlaceText = Annotated[
    PathText, AfterValidator(lambda path: _bucket_url(path) if is_url(path) else path)
]
# Of a held-out corpus: part of the names of figures.
CorpusName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
# A step (whole number) or a fraction of the run (a number with a point, at most 1.0).
Position = Annotated[int, Field(ge=0)] | Share
