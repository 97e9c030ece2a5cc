"""`metrics.jsonl`: one line a logged step, one a held-out evaluation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from est_ds.disk import replace_text
from est_ds.errors import gigabytes, naming
from est_ds.plans.phases import Phase

FILE = "metrics.jsonl"


def read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training lines and evaluation lines, in order; a last line cut short is left out."""
    lines = read_lines(run_dir)
    return [e for e in lines if "loss" in e], [e for e in lines if "eval_loss" in e]


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of steps that were left out (`skipped`: why) or whose loss was a spike (`spike`)."""
    return [e for e in read_lines(run_dir) if "skipped" in e or "spike" in e]


def read_boundaries(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of the sides of phase boundaries, in order: `step` is the first of the phase after,
    `boundary` the side, `before` or `after` (`training.boundaries`)."""
    return [e for e in read_lines(run_dir) if "boundary" in e]


@dataclass(frozen=True)
class Steps:
    """What the lines of some steps say of how they went.

    Attributes:
        clipped: share of the logged steps whose gradient was clipped; None of older lines.
        update_rms: root mean square of the update over the learning rate; None if no step was
            measured.
        measured: number of those that were.
        used: how the GPUs were used, by the names of the lines' fields: medians of `mfu` and
            `mfu_dense`, the largest `memory_peak_bytes`; empty on CPUs.
    """

    clipped: float | None
    update_rms: float | None
    measured: int
    used: dict[str, float] = field(default_factory=dict)


def steps_of(lines: Sequence[dict[str, Any]]) -> Steps:
    """Returns what training lines say together."""
    clipped = [e["clipped"] for e in lines if "clipped" in e]
    updates = [e["update_rms"] for e in lines if e.get("update_rms") is not None]
    used = [
        (name, over, [e[name] for e in lines if name in e])
        for name, over in (("mfu", median), ("mfu_dense", median), ("memory_peak_bytes", max))
    ]
    mean_square = sum(u * u for u in updates) / len(updates) if updates else None
    return Steps(
        clipped=sum(clipped) / len(clipped) if clipped else None,
        update_rms=None if mean_square is None else math.sqrt(mean_square),
        measured=len(updates),
        used={name: over(values) for name, over, values in used if values},
    )


def read_phase(run_dir: Path, phase: Phase) -> Steps:
    """Returns what the file says of the steps of a phase, whichever process trained them."""
    lines, _ = read_metrics(run_dir)
    return steps_of([e for e in lines if phase.from_step <= e["step"] < phase.until_step])


def phase_note(steps: Steps) -> str:
    """How the steps of a phase went, in words; nothing where nothing is known."""
    said = []
    if steps.clipped is not None:
        said.append(f"{steps.clipped:.0%} of the logged steps clipped")
    if steps.update_rms is not None:
        said.append(f"update {steps.update_rms:.2g} x lr (RMS, {steps.measured:,} steps)")
    return ", ".join(said + use_texts(steps.used))


def use_texts(used: dict[str, float]) -> list[str]:
    """How GPUs were used, in words: their MFU, with that of the dense model's FLOPs, and memory."""
    said = []
    if "mfu" in used:
        said.append(f"MFU {used['mfu']:.1%} (dense {used['mfu_dense']:.1%})")
    if "memory_peak_bytes" in used:
        said.append(f"{gigabytes(used['memory_peak_bytes'])} on a GPU")
    return said


def steps_logged(run_dir: Path) -> int:
    """Steps that a run under way has logged, from the end of its file."""
    try:
        with (run_dir / FILE).open("rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - 8192))
            lines = f.read().decode(errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        if line.startswith('{"step": ') and (number := line[9:].split(",")[0]).isdecimal():
            return int(number) + 1
    return 0


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    """All lines, in order; a last one cut short is left out."""
    file = run_dir / FILE
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


class MetricsFile:
    """Appends lines, each in the file when the call returns; a number that is none is null.

    Args:
        start: first step that this run trains; lines of a lost future, which a crashed run wrote
            after its last checkpoint, are dropped. An evaluation line belongs to the steps done.
        layout: what the times of steps depend on besides their plans.
    """

    def __init__(self, run_dir: Path, start: int, layout: dict[str, Any]) -> None:
        self._run_dir = run_dir
        self._of_steps = {"start": start, "layout": layout}
        self._open(start)

    def write_step(self, **entry: Any) -> None:
        """A line of a trained step, with where its processes started and in what layout."""
        self.write(**entry, **self._of_steps)

    def write(self, **entry: Any) -> None:
        with naming(self._file.name):
            self._file.write(_line(entry))

    def sync(self) -> None:
        """Waits until all lines are on disk, so that no checkpoint outlives those before it."""
        with naming(self._file.name):
            os.fsync(self._file.fileno())

    def go_back(self, start: int) -> None:
        """Drops the lines from step `start` on."""
        self._file.close()
        self._open(start)

    def close(self) -> None:
        self._file.close()

    def _open(self, start: int) -> None:
        file = self._run_dir / FILE
        kept = [e for e in read_lines(self._run_dir) if e["step"] < start]
        kept.sort(key=lambda e: (e["step"], "eval_loss" in e))
        replace_text(file, "".join(map(_line, kept)))
        self._file = file.open("a", buffering=1)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(finite(entry), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A value as JSON has it, in which there is no NaN and no infinity: None."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def nats(loss: float, bits_per_byte: float | None) -> str:
    """A held-out loss, and what it is in bits per byte of text where that is known."""
    return f"{loss:.4f}" + (f" ({bits_per_byte:.4f} bits per byte)" if bits_per_byte else "")


def depth_text(layers: int, of: int) -> str:
    """The model that an evaluation saw."""
    return "the full model" if layers == of else f"the model at depth {layers} of {of}"
