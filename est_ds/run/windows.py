"""The loss of every held-out window, beside the mean in `metrics.jsonl`."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from est_ds.disk import replace_bytes
from est_ds.errors import naming

FOLDER = "windows"
PARTS = ("losses", "targets", "windows")


@dataclass(frozen=True, eq=False)
class WindowLosses:
    """Held-out windows of one corpus, in the order in which they lie in it.

    Attributes:
        losses: mean over the window's targets, nats per token, float64 [n].
        targets: labels of the window that count, int64 [n].
        windows: number of the window in the corpus, int64 [n].
    """

    losses: np.ndarray
    targets: np.ndarray
    windows: np.ndarray

    @property
    def mean(self) -> float:
        """Mean over all targets: the held-out loss of the corpus."""
        return float((self.losses * self.targets).sum() / max(1, self.targets.sum()))


def windows_file(run_dir: Path, done: int) -> Path:
    """Where the evaluation after `done` steps is."""
    return run_dir / FOLDER / f"step_{done:08d}.npz"


def write_windows(run_dir: Path, done: int, by_corpus: dict[str, WindowLosses]) -> None:
    """Saves an evaluation after `done` steps, whole or not at all.

    NumPy's `.npz` with the arrays `NAME.losses`, `NAME.targets` and `NAME.windows` of each corpus.
    """
    file = windows_file(run_dir, done)
    arrays = {f"{n}.{part}": getattr(w, part) for n, w in by_corpus.items() for part in PARTS}
    content = io.BytesIO()
    np.savez(content, **arrays)
    with naming(str(file.parent)):
        file.parent.mkdir(exist_ok=True)
    replace_bytes(file, content.getvalue())


def read_windows(file: Path) -> dict[str, WindowLosses]:
    """Reads what `write_windows` wrote: windows by the name of the corpus."""
    with np.load(file, allow_pickle=False) as arrays:
        names = [key.removesuffix(".losses") for key in arrays.files if key.endswith(".losses")]
        return {n: WindowLosses(*(arrays[f"{n}.{part}"] for part in PARTS)) for n in names}
