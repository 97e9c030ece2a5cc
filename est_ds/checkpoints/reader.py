"""Reads ranges of a checkpoint's tensors, whatever files they lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from est_ds.checkpoints.index import Damaged, Index, read_index
from est_ds.disk import describe

WEIGHT = "weight"


def fragment_key(state: str, start: int, name: str) -> str:
    """The name of a range in a rank's file.

    Args:
        state: weight, exp_avg or exp_avg_sq.
        start: first element in the flattened parameter.
        name: of the parameter.
    """
    return f"{state}:{start}:{name}"


def damage(checkpoint: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is.

    Args:
        hashes: False compares sizes only.
    """
    try:
        return file_damage(checkpoint, read_index(checkpoint), hashes)
    except Damaged as e:
        return str(e)


def file_damage(checkpoint: Path, index: Index, hashes: bool = True) -> str | None:
    """As `damage`, of a checkpoint whose `checkpoint.json` was read."""
    for name, written in sorted(index.files.items()):
        file = checkpoint / name
        try:
            size = file.stat().st_size
            if size != written.bytes:
                return f"{name} has {size} bytes, not {written.bytes}"
            if hashes and describe(file) != written:
                return f"{name} is not what was written (its sha256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as e:
            return f"{name} cannot be read ({e.strerror})"
    return None


class Range(NamedTuple):
    """Elements start to stop of a flattened parameter, which a file holds."""

    start: int
    stop: int
    file: str


@dataclass(frozen=True)
class Contents:
    """What files of a checkpoint hold.

    Attributes:
        keys: of every element: weight, exp_avg, exp_avg_sq, ...
        ranges: of every parameter, by its name.
    """

    keys: set[str]
    ranges: dict[str, list[Range]]


def contents(
    checkpoint: Path, files: Iterable[str], opened: Callable[[str], Any] | None = None
) -> Contents:
    """Reads the headers of some of a checkpoint's files.

    Args:
        opened: gives a file, opened; each is closed at once if None.

    Raises:
        Damaged: one is missing or unreadable.
    """
    found = Contents(set(), {})
    for name in files:
        file = opened(name) if opened else _opened(checkpoint, name)
        for key in file.keys():
            state, start, parameter = key.split(":", 2)
            found.keys.add(state)
            if state == WEIGHT:
                stop = int(start) + file.get_slice(key).get_shape()[0]
                found.ranges.setdefault(parameter, []).append(Range(int(start), stop, name))
    return found


def _opened(checkpoint: Path, name: str) -> Any:
    try:
        return safe_open(checkpoint / name, "pt")
    except (SafetensorError, OSError) as e:
        raise Damaged(f"{name} cannot be read ({e})") from None


class Checkpoint:
    """An open checkpoint, to be used in a `with`.

    Args:
        folder: where it is.
        index: its `checkpoint.json`, if that was read before.
        known: what its files hold as far as it will be read, if that is known; else all of them are
            looked at.

    Attributes:
        index: its `checkpoint.json`.
        names: of the parameters that it holds.
        keys: what it holds of every element: weight, exp_avg, exp_avg_sq, ...

    Raises:
        Damaged: a file is missing or unreadable, or the files do not hold every parameter.
    """

    def __init__(
        self, folder: Path, index: Index | None = None, known: Contents | None = None
    ) -> None:
        self._folder = folder
        self.index = index or read_index(folder)
        self.names = self.index.parameters.keys()
        self._files = ExitStack()
        self._open: dict[str, Any] = {}
        try:
            # They stay open: a training under way may remove the checkpoint.
            here = known or contents(folder, self.index.files, self._file)
            self.keys, self._ranges = here.keys, here.ranges
            for name, shape in self.index.parameters.items() if known is None else ():
                check_cover(name, self._ranges.get(name, []), 0, prod(shape))
        except Damaged:
            self._files.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements start to stop of a flattened parameter: fp32 [stop - start], on the CPU."""
        found = torch.empty(stop - start)
        for first, last, file in self._ranges.get(name, ()):
            low, high = max(start, first), min(stop, last)
            if low < high:
                held = self._file(file).get_slice(fragment_key(state, first, name))
                found[low - start : high - start] = held[low - first : high - first]
        return found

    def weights(self) -> dict[str, Tensor]:
        """All weights by their Hugging Face names, fp32, on the CPU."""
        return {
            name: self.read(name, WEIGHT, 0, prod(shape)).view(shape)
            for name, shape in self.index.parameters.items()
        }

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._files.enter_context(_opened(self._folder, name))
        return self._open[name]


def check_cover(name: str, ranges: list[Range], start: int, stop: int) -> None:
    """Checks that ranges of a parameter hold its elements start to stop.

    Raises:
        Damaged: they do not.
    """
    at = start
    for first, last, _ in sorted(ranges):
        if first > at or start < at != first:
            break
        at = last
    if at < stop:
        raise Damaged(f"its files do not hold the whole of {name}")
