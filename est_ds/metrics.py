"""`metrics.jsonl`: one line a logged step, one a held-out evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training lines and evaluation lines, in order; a last line cut short is left out."""
    file = run_dir / FILE
    steps, evaluations = [], []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        (evaluations if "eval_loss" in entry else steps).append(entry)
    return steps, evaluations


class MetricsFile:
    """Appends lines, each on disk when the call returns.

    Args:
        start: first step that this run trains; lines of a lost future, which a crashed run wrote
            after its last checkpoint, are dropped. An evaluation line belongs to the steps done.
    """

    def __init__(self, run_dir: Path, start: int) -> None:
        file = run_dir / FILE
        steps, evaluations = read_metrics(run_dir)
        kept = [e for e in steps if e["step"] < start]
        kept += [e for e in evaluations if e["step"] < start]
        kept.sort(key=lambda e: (e["step"], "eval_loss" in e))
        beside = file.with_name(FILE + ".partial")
        beside.write_text("".join(json.dumps(e) + "\n" for e in kept))
        os.replace(beside, file)
        self._file = file.open("a", buffering=1)

    def write(self, **entry: Any) -> None:
        self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self._file.close()
