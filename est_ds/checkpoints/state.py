"""What a checkpoint holds of a run besides weights and moments."""

from __future__ import annotations

from typing import Any

from est_ds.config.strict import Stored


class Next(Stored):
    """What the step after the checkpoint does, as far as it can be said beforehand."""

    lr: float
    plan_digest: str
    data_digest: str


class Seen(Stored):
    """Losses that the next one is compared with, and steps not trained, with the reason."""

    losses: tuple[float, ...] = ()
    skipped: dict[int, str] = {}


class State(Stored):
    """The state of a run.

    Attributes:
        config: the run file, resolved.
        versions: of the packages that wrote it.
        corpus: fingerprint of the training corpora.
        held_out: fingerprints of the held-out corpora by name.
        tokens: read so far.
        trained_s: seconds that the steps took up to here, those that were left out included, of
            all starts; None where an earlier version began the run and did not count them.
        next: None after the last step.
        divergence: see `training.divergence`.
        evaluation_due: a notice came before the evaluation after this step was done.
        optimizer_steps: AdamW's own count, by which it corrects the moments' bias.
        births: of layers that began with zero moments, by what their parameters' names begin with,
            AdamW's count then: they count from there.
    """

    config: dict[str, Any]
    versions: dict[str, str]
    corpus: str
    held_out: dict[str, str]
    tokens: int
    trained_s: float | None = None
    next: Next | None
    divergence: Seen = Seen()
    evaluation_due: bool = False
    optimizer_steps: int = 0
    births: dict[str, int] = {}
