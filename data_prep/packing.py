"""A packing under way, in a folder of its own: committed now and then, at last moved into place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from data_prep.readers.base import Place, Reader, Skipped
from data_prep.shards import Format, ShardWriter
from data_prep.tokenizing import Job, Result
from est_ds.data.header import WRITTEN_CODES
from est_ds.data.manifest import FORMAT_VERSION, Manifest, Shard, manifest_path
from est_ds.disk import hold
from est_ds.errors import UserError

COMMIT_EVERY_S = 10.0
# Raised whenever the same sources and settings would give other bytes.
_ALGORITHM = 2


class Packing:
    """The folder `OUT.packing`: shards, and the state to continue from.

    Args:
        out: prefix of the corpus, or of `OUT.train` and `OUT.valid`.
        settings: everything besides the sources that the bytes depend on.
        readers: the sources. Those read so far must be as they were; later ones may change.
        fresh: whether to begin anew instead of continuing.

    Attributes:
        place: where to go on.
        resumed_tokens: tokens that former processes packed.

    Raises:
        UserError: another process packs there, or what a former one began was something else.
    """

    def __init__(
        self, out: str, job: Job, settings: dict[str, Any], readers: list[Reader], fresh: bool
    ) -> None:
        self._out, self._job, self._readers = out, job, readers
        self._settings = {**settings, "algorithm": _ALGORITHM}
        self.folder = Path(f"{out}.packing")
        self._check_targets()
        self._lock = _locked(self.folder)
        try:
            if fresh:
                self._remove_files()
            self._continue(self._read_state())
        except BaseException:
            self._lock.close()
            raise
        self._committed = time.monotonic()

    def _prefix(self, part: str) -> str:
        return self._out if part == "all" else f"{self._out}.{part}"

    def _check_targets(self) -> None:
        if self._out.endswith("/"):
            raise UserError(f"--out {self._out} is a folder; give a prefix in it.")
        for part in self._job.parts:
            for ending in ("bin", "idx", "manifest.json"):
                if Path(target := f"{self._prefix(part)}.{ending}").is_dir():
                    raise UserError(f"--out: {target} is a folder; give another --out.")

    def _continue(self, state: dict[str, Any] | None) -> None:
        self.begun = state is not None
        parts = state["parts"] if state else {}
        self.skipped = Skipped()
        self.place = Place(**state["place"]) if state else Place()
        if state:
            self._check(state)
            self.skipped.counts.update(state["skipped"])
            self.skipped.first.update(state["first_skipped"])

        def begun(part: str) -> dict[str, Any]:
            if state:
                return {**parts[part], "counts": np.array(parts[part]["counts"])}
            counts = np.zeros(self._job.encoder.vocabulary, np.int64)
            return {**ShardWriter.NOTHING, "counts": counts}

        codes = WRITTEN_CODES[self._settings["type_codes"] or "deepspeed"]
        dtype = self._job.dtype
        form = Format(dtype, codes[dtype.name], self._settings["shard_tokens"])
        self.writers = {
            part: ShardWriter(self.folder, part, form, begun(part)) for part in self._job.parts
        }
        self.complete = bool(state and state["complete"])
        self.resumed_tokens = self.num_tokens

    @property
    def num_tokens(self) -> int:
        return sum(writer.num_tokens for writer in self.writers.values())

    def add(self, result: Result, place: Place) -> None:
        """Appends a task's documents; `place` is where its pieces end."""
        for part, packed in result.parts.items():
            self.writers[part].add(packed)
        self.skipped.update(result.skipped)
        self.place = place
        if time.monotonic() - self._committed >= COMMIT_EVERY_S:
            self.commit()

    def commit(self) -> None:
        """Lets a later process go on from here."""
        parts = {part: writer.commit() for part, writer in self.writers.items()}
        state = {
            "settings": self._settings,
            "sources_read": self._sources_read(),
            "place": asdict(self.place),
            "skipped": self.skipped.counts,
            "first_skipped": self.skipped.first,
            "complete": self.complete,
            "parts": parts,
        }
        temporary = self.folder / "state.tmp"
        with temporary.open("wb") as file:
            counts = {part: writer.counts for part, writer in self.writers.items()}
            np.savez(file, state=np.array(json.dumps(state)), **counts)
            file.flush()
            os.fsync(file)
        os.replace(temporary, self.folder / "state.npz")
        self.begun = True
        self._committed = time.monotonic()

    def finish(self, facts: dict[str, Any]) -> dict[str, Manifest]:
        """Moves the corpora into place, each with its manifest.

        Args:
            facts: fields of the manifests that all parts share.

        Returns:
            The manifests by prefix.
        """
        manifests = {}
        for part, writer in self.writers.items():
            writer.finish()
            manifests[self._prefix(part)] = self._manifest(part, writer, facts)
        self.complete = True
        self.commit()
        for (prefix, manifest), writer in zip(
            manifests.items(), self.writers.values(), strict=True
        ):
            self._move(prefix, manifest, writer)
        self.remove()
        return manifests

    def _manifest(self, part: str, writer: ShardWriter, facts: dict[str, Any]) -> Manifest:
        shards = writer.finished
        if len(shards) == 1:
            shards = [shards[0].model_copy(update={"suffix": ""})]
        return Manifest(
            format_version=FORMAT_VERSION,
            num_tokens=writer.num_tokens,
            num_documents=writer.num_documents,
            text_bytes=writer.text_bytes,
            unigram_entropy=unigram_entropy(writer.counts),
            part=part,
            held_out=self._job.held_out,
            skipped=dict(sorted(self.skipped.counts.items())),
            shards=shards,
            **facts,
        )

    def _move(self, prefix: str, manifest: Manifest, writer: ShardWriter) -> None:
        """Into place; may have been begun by a process that died over it."""
        temporary = self.folder / "manifest.json"
        temporary.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _remove_former(prefix, manifest.shards)
        for number, shard in enumerate(manifest.shards):
            for ending in ("bin", "idx"):
                source = writer.path(number, ending)
                if source.exists():
                    os.replace(source, f"{prefix}{shard.suffix}.{ending}")
        os.replace(temporary, manifest_path(prefix))

    def close(self) -> None:
        """Lets go of the folder; it stays if a later process can continue from it."""
        for writer in self.writers.values():
            writer.close()
        if not self.begun:
            self.remove()
        self._lock.close()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_files(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def _read_state(self) -> dict[str, Any] | None:
        try:
            with np.load(self.folder / "state.npz") as file:
                state = json.loads(str(file["state"]))
                for part, fields in state["parts"].items():
                    fields["counts"] = file[part]
                return state
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            raise UserError(
                f"{self.folder}/state.npz cannot be read ({error}); start anew with --fresh."
            ) from None

    def _check(self, state: dict[str, Any]) -> None:
        began = f"{self.folder} holds an interrupted packing"
        ways = "give the same again to continue it, or start anew with --fresh"
        for name, value in self._settings.items():
            if (former := state["settings"].get(name)) != value:
                raise UserError(f"{began} with {name}={former}, now {name}={value}; {ways}.")
        grown = state["complete"] and self.place.source + 1 < len(self._readers)
        same = self.place.source < len(self._readers) and (
            state["sources_read"] == self._sources_read()
        )
        if grown or not same:
            raise UserError(
                f"{began}, and the files that it has read are not what --input gives now: some "
                f"were changed, added, removed or touched; {ways}."
            )

    def _sources_read(self) -> str:
        """Hash of the identities of the sources up to the place."""
        state = hashlib.sha256()
        for reader in self._readers[: self.place.source + (self.place.position is not None)]:
            state.update(f"{reader.identity}\n".encode())
        return state.hexdigest()


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats per token of the frequencies [vocabulary]."""
    shares = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def _remove_former(prefix: str, shards: list[Shard]) -> None:
    """Removes a former corpus of that name: its manifest, that it may not vouch for new files, and
    shards that the new one does not have."""
    former = manifest_path(prefix)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        suffixes = {s["suffix"] for s in json.loads(former.read_text())["shards"]}
        former.unlink()
        for suffix in suffixes - {shard.suffix for shard in shards}:
            for ending in ("bin", "idx"):
                Path(f"{prefix}{suffix}.{ending}").unlink(missing_ok=True)
    former.unlink(missing_ok=True)


def _locked(folder: Path) -> Any:
    """The folder, made and held by this process until the file is closed."""
    try:
        return hold(folder / "lock")
    except BlockingIOError:
        raise UserError(
            f"--out: another process is packing into {folder}; wait for it, or give another --out."
        ) from None
    except OSError as error:
        raise UserError(
            f"--out: cannot make the folder {folder} ({error.strerror}); give a path that can be "
            f"written."
        ) from None
