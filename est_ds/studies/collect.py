"""Reads the result of a run from its directory, and clears what is no longer needed of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from est_ds.checkpoints.store import Store
from est_ds.disk import replace_bytes
from est_ds.errors import Failure
from est_ds.ranks.versions import versions
from est_ds.run.metrics import read_boundaries, read_metrics
from est_ds.run.windows import windows_file
from est_ds.studies.results import RunResult
from est_ds.studies.runs import StudyRun


def collect(run: StudyRun, parameters: int, diverged: bool) -> RunResult:
    """What a run that has ended found.

    Args:
        parameters: of its model.
        diverged: whether it ended before its last step because of what it computed.

    Raises:
        Failure: its metrics lack the last evaluation.
    """
    directory = Path(run.config.run_dir)
    steps, evaluations = read_metrics(directory)
    last = evaluations[-1] if evaluations else {}
    if not diverged and last.get("step") != run.steps - 1:
        raise Failure(f"{directory}: metrics.jsonl has no evaluation after step {run.steps}")
    timed = [line["step_s"] for line in steps]
    return RunResult(
        **run.facts,
        parameters=parameters,
        loss=None if diverged else last["eval_loss"],
        losses=last.get("eval_losses", {}),
        bits_per_byte=last.get("eval_bits_per_byte"),
        curve=[(e["step"] + 1, e["eval_loss"]) for e in evaluations if e["eval_loss"] is not None],
        first_loss=steps[0]["loss"] if steps and steps[0]["step"] == 0 else None,
        data=(steps[0]["data_digest"], steps[-1]["data_digest"]) if steps else None,
        boundaries=read_boundaries(directory),
        step_s=median(timed) if timed else None,
        device=_device(steps),
        versions=versions(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _device(steps: list[dict[str, Any]]) -> str:
    return ((steps[-1].get("layout") or {}) if steps else {}).get("device", "")


def keep_windows(run: StudyRun, target: Path) -> None:
    """Copies the held-out losses by window of the last evaluation, whole or not at all."""
    source = windows_file(Path(run.config.run_dir), run.steps)
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(target, source.read_bytes())


def clear(run: StudyRun) -> None:
    """Removes the checkpoints of a run whose result is on disk."""
    Store.of(run.config.run_dir).remove_all()
