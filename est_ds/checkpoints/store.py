"""The checkpoints of a run: which there are, which is the latest, which are kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from est_ds.checkpoints.index import FILE, TAG, Damaged, read_index
from est_ds.config.sections import Checkpoint as Settings
from est_ds.disk import replace_text
from est_ds.errors import UserError

LATEST, BEST = "latest", "best"


def tag_of(step: int) -> str:
    return f"step_{step:08d}"


def kept_steps(
    losses: Mapping[int, float | None], settings: Settings
) -> tuple[set[int], int | None]:
    """Returns the checkpoints that the settings keep, and the best of them.

    Args:
        losses: held-out losses by step, None where none was measured.
    """
    steps = sorted(losses)
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    kept = set(steps[-settings.keep_last :] if settings.keep_last else steps)
    if settings.keep_every:
        kept.update(step for step in steps if step % settings.keep_every == 0)
    if settings.keep_best and measured:
        kept.add(_best(measured))
    measured = {step: loss for step, loss in measured.items() if step in kept}
    return kept, _best(measured) if measured else None


def _best(losses: Mapping[int, float]) -> int:
    return min(losses, key=lambda step: (losses[step], step))


class Store:
    """The folder `run_dir/checkpoints`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._losses: dict[tuple[int, int, int], float | None] = {}

    @classmethod
    def of(cls, run_dir: str | os.PathLike) -> Store:
        """Those of a run directory."""
        return cls(Path(run_dir) / "checkpoints")

    def steps(self) -> list[int]:
        """Steps of all checkpoints, in order; a folder gets its name when it is complete."""
        matches = [TAG.fullmatch(p.name) for p in self.folder.glob("step_*")]
        return sorted(int(m[1]) for m in matches if m)

    def path(self, step: int) -> Path:
        return self.folder / tag_of(step)

    def named(self, pointer: str) -> int | None:
        """The step that `latest` or `best` names; None without such a file, or if it names none."""
        try:
            match = TAG.fullmatch((self.folder / pointer).read_text().strip())
        except (OSError, UnicodeDecodeError):
            return None
        return int(match[1]) if match else None

    @property
    def latest(self) -> int | None:
        """The step that `latest` names, if that checkpoint is there."""
        step = self.named(LATEST)
        return step if step is not None and self.path(step).is_dir() else None

    def candidates(self) -> list[int]:
        """Steps to resume from, the best choice first: what `latest` names, then what is before it.

        Without a `latest` that names a checkpoint, all, newest first.
        """
        steps, latest = self.steps(), self.named(LATEST)
        return [s for s in reversed(steps) if latest not in steps or s <= latest]

    def point_to(self, step: int) -> None:
        """Makes a checkpoint the latest."""
        replace_text(self.folder / LATEST, tag_of(step) + "\n")

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it is neither resumed from nor counted."""
        aside = self.folder / f"damaged_{tag_of(step)}"
        if aside.is_dir():
            shutil.rmtree(aside)
        return self.path(step).rename(aside)

    def find(self, wanted: str) -> int:
        """The step of `latest`, `best`, or a number of steps.

        Raises:
            UserError: there is no such checkpoint.
        """
        steps = self.steps()
        is_step = wanted.isdecimal() and len(wanted) < 20
        step = int(wanted) if is_step else self.named(wanted)
        if step in steps:
            return step
        if not steps:
            run = self.folder.parent
            began = (run / "config.yaml").is_file()
            raise UserError(
                f"{str(self.folder)!r} holds no checkpoint; train the run first: est-ds train "
                + (str(run) if began else f"RUN_FILE run_dir={run}")
            )
        raise UserError(
            f"checkpoint {wanted!r:.40} is not in {str(self.folder)!r}; use {LATEST}, {BEST} or "
            f"one of the steps {', '.join(map(str, steps))}."
        )

    @contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Reads a checkpoint, which a training under way may remove meanwhile.

        Raises:
            UserError: it was removed.
        """
        try:
            yield
        except Exception:
            if self.path(step).is_dir():
                raise
            raise UserError(
                f"checkpoint {step} of {str(self.folder)!r} was removed while it was read: a "
                f"training under way keeps its latest ones (checkpoint.keep_last). Try again, or "
                f"take one that stays."
            ) from None

    def keep(self, newest: int, settings: Settings, held: Collection[int] = ()) -> None:
        """Moves `latest` and `best`, and removes what the settings do not keep.

        Args:
            newest: the checkpoint just completed. Later ones, of a run that went back, are left.
            held: steps that stay for now, since they are being copied.
        """
        self.point_to(newest)
        losses = {step: self._eval_loss(step) for step in self.steps() if step <= newest}
        kept, best = kept_steps(losses, settings)
        if best is not None:
            replace_text(self.folder / BEST, tag_of(best) + "\n")
        elif self.named(BEST) not in kept:
            (self.folder / BEST).unlink(missing_ok=True)
        for step in losses.keys() - kept - set(held):
            self.remove(step)

    def remove(self, step: int) -> None:
        """Removes a checkpoint, out of sight first: half of one must never be seen."""
        dropped = self.folder / f".{tag_of(step)}.dropped"
        if dropped.is_dir():
            shutil.rmtree(dropped)
        self.path(step).rename(dropped)
        shutil.rmtree(dropped) if dropped.is_dir() else dropped.unlink()

    def remove_all(self) -> None:
        """Removes every checkpoint, with the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def clean(self) -> None:
        """Removes what a killed process left half-written or half-removed."""
        for left in [*self.folder.glob(".*.partial"), *self.folder.glob(".*.dropped")]:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()

    def _eval_loss(self, step: int) -> float | None:
        """Read once: `checkpoint.json` of many files is long."""
        try:
            status = (self.path(step) / FILE).stat()
            known = step, status.st_ino, status.st_mtime_ns
            if known not in self._losses:
                self._losses[known] = read_index(self.path(step)).eval_loss
            return self._losses[known]
        except (Damaged, OSError):
            return None
