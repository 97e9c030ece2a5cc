"""What a branch may change of its parent, and where it goes on in the data."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from est_ds.config.kinds import is_url
from est_ds.config.run_config import RunConfig
from est_ds.config.start import Reading
from est_ds.data.manifest import read_manifest
from est_ds.data.mixture import Mixture
from est_ds.data.tokenizer import tokenizer_sha256
from est_ds.design import corpus_weights
from est_ds.errors import UserError
from est_ds.plans.methods.base import Method
from est_ds.run.directory import FREE_TO_CHANGE
from est_ds.run.prepare import Run
from est_ds.slicing.families import hf_config
from est_ds.slicing.families.fields import dropout_of

# Besides what a resumed run may change. Whatever is in neither list stays as it is.
MAY_CHANGE = (
    "steps",
    "tokens",  # says the steps
    "seed",
    "seeds.*",
    "method.*",
    "objective.*",
    "data.*",
    "batch.*",
    "optimizer.*",
    "schedule*",
)
STAYS = {
    "model": "the weights are of that model",
    "precision": "moments and weights were rounded by it",
}


def check_changes(
    there: RunConfig, here: RunConfig, changed: dict[str, tuple[Any, Any]], step: int
) -> None:
    """Refuses what a branch cannot change.

    Args:
        changed: fields of the two configs that differ, with both values.
        step: the first step of the branch.

    Raises:
        UserError: one of them cannot, or no step is left to train.
    """
    dropped = {*dropout_of(hf_config(there.model)), *dropout_of(hf_config(here.model))}
    allowed = (*FREE_TO_CHANGE, *MAY_CHANGE, *(f"model.{field}" for field in dropped))
    for field, (former, now) in changed.items():
        if not any(fnmatch(field, pattern) for pattern in allowed):
            why = STAYS.get(field.partition(".")[0], "a branch goes on with it")
            raise UserError(
                f"{field} is {former!r} in the parent and {now!r} here, and cannot change: {why}; "
                f"leave it as it is, or train a new run from its start."
            )
    if (former := there.optimizer.inactive) == "freeze" != here.optimizer.inactive:
        raise UserError(
            f"optimizer.inactive is {former!r} in the parent and {here.optimizer.inactive!r} here, "
            f"and cannot change so: every element has counted its own steps, and zero_grad counts "
            f"those of all alike; leave it as it is."
        )
    if here.steps <= step:
        raise UserError(
            f"steps={here.steps} leaves a branch at step {step} nothing to train; set steps above "
            f"{step}, or choose an earlier --at."
        )


def check_depth(there: Method, here: Method, step: int) -> None:
    """Checks that the branch's method goes on with the layers that the parent's had by then.

    Raises:
        UserError: it would take layers that do not exist yet, or leave some out.
    """
    former, now = (method.layers(max(step - 1, 0)) for method in (there, here))
    if former != now:
        raise UserError(
            f"method: after {step} steps the model of the parent (method.name="
            f"{there.settings.name!r}) has {len(former)} layers, {former}, and under method.name="
            f"{here.settings.name!r} it would have {len(now)}, {now}; choose method.phases that "
            f"have these layers before step {step} (they may grow at it), or another --at."
        )


def check_tokenizer(there: RunConfig, here: RunConfig) -> None:
    """Refuses another tokenizer, as far as the parent's is still known: its folder may be gone, and
    corpora need not name theirs.

    Raises:
        UserError: it is another one.
    """
    former, now = _tokenizer(there), _tokenizer(here)
    if None not in (former, now) and former != now:
        raise UserError(
            f"data.tokenizer={here.data.tokenizer!r} (sha256 {now[:12]}...) is not the tokenizer "
            f"of the parent, {there.data.tokenizer!r} ({former[:12]}...): the weights are of its "
            f"ids; give that one and corpora that it packed, or train a new run from its start."
        )


def _tokenizer(config: RunConfig) -> str | None:
    if is_url(config.data.tokenizer) or Path(config.data.tokenizer).exists():
        return tokenizer_sha256(config.data.tokenizer)
    prefixes = [*(part.corpus for part in config.data.parts), *config.data.held_out.values()]
    manifests = [read_manifest(prefix) for prefix in prefixes]
    return next((m.tokenizer_sha256 for m in manifests if m), None)


@dataclass(frozen=True)
class Position:
    """Where a branch goes on in a corpus.

    Attributes:
        samples: of the corpus's own order that are behind it.
        epochs: as many, of all that it has.
        is_kept: the parent read them; else the branch begins with the first one.
        why: it begins anew.
    """

    corpus: str
    samples: int
    epochs: float
    is_kept: bool
    why: str = ""

    def __str__(self) -> str:
        if self.is_kept:
            return (
                f"{self.corpus}: goes on behind {self.samples:,} sequences ({self.epochs:.3g} "
                f"epochs)"
            )
        return f"{self.corpus}: begins with its first sequence, {self.why}"


def expected_positions(there: RunConfig, trained_on: str, run: Run, step: int) -> list[Position]:
    """Where the branch's corpora stand after `step` steps: behind what the parent read of each in
    the order that they have now, at the start of all others.

    Args:
        trained_on: fingerprints of the parent's corpora (`State.corpus`).
    """
    here, found = run.config, []
    read = _mixture(there).counts(step * there.batch.global_).tolist()
    read = dict(enumerate(zip(trained_on.split("+"), read)))
    other_order = _other_order(there, here)
    for i, (part, windows) in enumerate(zip(here.data.parts, run.train.corpora)):
        fingerprint, samples = read.get(i, ("", 0))
        why = other_order
        if windows.corpus.fingerprint != fingerprint:
            why = "as the parent did not read it" + " in this place" * _is_in(windows, read)
        samples = 0 if why else samples
        found.append(Position(part.corpus, samples, samples / windows.num_samples, not why, why))
    return found


def _is_in(windows, read: dict[int, tuple[str, int]]) -> bool:
    return windows.corpus.fingerprint in [fingerprint for fingerprint, _ in read.values()]


def _other_order(there: RunConfig, here: RunConfig) -> str:
    """Why the order of every corpus is another one; nothing if it is not."""
    if there.seed_of("data") != here.seed_of("data"):
        return "in the order of another seed"
    if there.data.sequence != here.data.sequence or there.data.shuffle != here.data.shuffle:
        return "since they are cut otherwise"
    return "since another objective cuts them" if there.objective != here.objective else ""


def reading_of(
    there: RunConfig, here: RunConfig, positions: list[Position], step: int
) -> Reading | None:
    """What the branch's `start` says of the data; the parent's own where the config alone puts
    every corpus at its position, so that an unchanged branch reads what its parent would have."""
    inherited = there.start.reading if there.start else None
    if inherited and len(inherited.samples) != len(positions):
        inherited = None
    expected = [position.samples for position in positions]
    if _mixture(here, inherited).counts(step * here.batch.global_).tolist() == expected:
        return inherited
    return Reading(step=step, samples=tuple(expected))


def _mixture(config: RunConfig, reading: Reading | None = None) -> Mixture:
    reading = reading or (config.start.reading if config.start else None)
    return Mixture(corpus_weights(config), config.batch.global_, reading)
