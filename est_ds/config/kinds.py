"""Kinds of values that several sections of a run file hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
# Of a file or folder. `~` and `$VARIABLE` in it are replaced when a run file is read.
PathText = Annotated[str, Field(min_length=1)]
# Of a held-out corpus: part of the names of figures.
CorpusName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
# A step (whole number) or a fraction of the run (a number with a point, at most 1.0).
Position = Annotated[int, Field(ge=0)] | Share
