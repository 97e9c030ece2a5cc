"""The copies of a run's checkpoints in a bucket: `step_XXXXXXXX/`, as in the run directory.

A copy is whole once it has a `checkpoint.json` that is what was written: that file is written last
and removed first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from est_ds.checkpoints.index import FILE, TAG, Damaged, Index, parse_index
from est_ds.checkpoints.store import kept_steps, tag_of
from est_ds.config.sections import Checkpoint as Settings
from est_ds.data.remote import Remote, RemoteError, RemoteMissing
from est_ds.run.metrics import FILE as METRICS
from est_ds.run.parent import FILE as PARENT

FIELD = "checkpoint.copy_to"
# Of the run directory, beside every copy: a run that goes on elsewhere has its past.
BESIDE = ("config.yaml", METRICS, PARENT)


class Bucket(Remote):
    """The folder `checkpoint.copy_to`, of one run."""

    def __init__(self, url: str) -> None:
        super().__init__(url, f"{FIELD}={url!r}")
        self._losses: dict[int, float | None] = {}  # of whole copies, as far as they are known

    def steps(self) -> list[int]:
        """Steps of all copies, in order, also of those that are not whole."""
        return sorted(int(m[1]) for name in self.sizes() if (m := TAG.fullmatch(name)))

    def index(self, step: int) -> Index | None:
        """The `checkpoint.json` of a copy; None of one that is not whole."""
        try:
            return parse_index(self.read(f"{tag_of(step)}/{FILE}"), tag_of(step))
        except (RemoteMissing, Damaged):
            return None

    def newest(self, before: int | None = None) -> Index | None:
        """The `checkpoint.json` of the newest whole copy; None if there is none.

        Args:
            before: only of fewer steps than this.
        """
        steps = [step for step in reversed(self.steps()) if before is None or step < before]
        return next((index for step in steps if (index := self.index(step))), None)

    def begin(self, step: int) -> None:
        """Makes a copy of former times one that is not whole, before it is written anew."""
        self._losses.pop(step, None)
        self.remove(f"{tag_of(step)}/{FILE}")

    def complete(self, index: Index, run_dir: Path, goes_on: Callable[[], None]) -> None:
        """Makes a copy whole, all of whose files are there.

        Args:
            run_dir: what of it lies beside the copy is written too.
            goes_on: see `send`.

        Raises:
            RemoteError: a file is not there, or the bucket does not answer.
        """
        tag = tag_of(index.step)
        sizes = self.sizes(tag)
        for name, file in index.files.items():
            if sizes.get(name) != file.bytes:
                found = f"{sizes[name]} bytes" if name in sizes else "nothing"
                raise RemoteError(
                    f"{self.url}/{tag}/{name} has {found} after it was written, not {file.bytes}"
                )
        for name in sizes.keys() - index.files.keys() - set(BESIDE):
            self.remove(f"{tag}/{name}")  # of a former copy by more processes
        for name in BESIDE:
            if (run_dir / name).exists():
                self.send(run_dir / name, f"{tag}/{name}", goes_on)
        self.write(f"{tag}/{FILE}", index.to_json().encode())
        self._losses[index.step] = index.eval_loss

    def keep(self, newest: int, settings: Settings) -> None:
        """Removes what the settings do not keep, as `Store.keep` does, and what is not whole."""
        steps = [step for step in self.steps() if step <= newest]
        for step in steps:
            if step not in self._losses and (index := self.index(step)):
                self._losses[step] = index.eval_loss
        whole = {step: self._losses[step] for step in steps if step in self._losses}
        kept, _ = kept_steps(whole, settings)
        for step in set(steps) - kept:
            self.begin(step)
            self.remove_folder(tag_of(step))
