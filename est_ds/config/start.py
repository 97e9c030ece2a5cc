"""The `start` section of a `config.yaml`: where a run begins that begins with a checkpoint which it
did not write. `est-ds branch` writes it; nobody else does."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from est_ds.config.strict import Strict

Count = Annotated[int, Field(ge=0)]


class Reading(Strict):
    """How far the training corpora were read when a step began that reads them otherwise.

    Attributes:
        step: that step.
        samples: of every corpus's own order, those that were read by then.
    """

    step: Count
    samples: Annotated[tuple[Count, ...], Field(min_length=1)]


class Start(Strict):
    """What is behind a run before it trains its first step.

    Attributes:
        step: its first step; its first checkpoint is of so many steps.
        tokens: read by then.
        reading: how far the corpora were read by then; None where data and batches have been the
            same since step 0.
    """

    step: Count
    tokens: Count
    reading: Reading | None = None
