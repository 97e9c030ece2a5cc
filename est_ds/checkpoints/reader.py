"""Reads ranges of a checkpoint's tensors, whatever files they lie in."""

from __future__ import annotations

from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

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


def damage(checkpoint: Path, part: tuple[int, int] = (0, 1), hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is.

    Args:
        part: (i, n): hashes only every n-th file from the i-th on, so that n processes may share
            the work.
        hashes: False compares sizes only.
    """
    try:
        return file_damage(checkpoint, read_index(checkpoint), part, hashes)
    except Damaged as e:
        return str(e)


def file_damage(
    checkpoint: Path, index: Index, part: tuple[int, int] = (0, 1), hashes: bool = True
) -> str | None:
    """As `damage`, of a checkpoint whose `checkpoint.json` was read."""
    for i, (name, written) in enumerate(sorted(index.files.items())):
        file = checkpoint / name
        try:
            size = file.stat().st_size
            if size != written.bytes:
                return f"{name} has {size} bytes, not {written.bytes}"
            if hashes and i % part[1] == part[0] and describe(file) != written:
                return f"{name} is not what was written (its sha256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as e:
            return f"{name} cannot be read ({e.strerror})"
    return None


class Checkpoint:
    """An open checkpoint, to be used in a `with`.

    Args:
        folder: where it is.
        index: its `checkpoint.json`, if that was read before.

    Attributes:
        index: its `checkpoint.json`.
        names: of the parameters that it holds.
        keys: what it holds of every element: weight, exp_avg, exp_avg_sq, ...

    Raises:
        Damaged: a file is missing or unreadable, or the files do not hold every parameter.
    """

    def __init__(self, folder: Path, index: Index | None = None) -> None:
        self.index = index or read_index(folder)
        self.names = self.index.parameters.keys()
        self.keys: set[str] = set()
        self._files = ExitStack()
        # name -> (start, stop, file) of the ranges, in their order
        self._ranges: dict[str, list[tuple[int, int, Any]]] = {n: [] for n in self.index.parameters}
        for name in self.index.files:
            try:
                file = self._files.enter_context(safe_open(folder / name, "pt"))
            except (SafetensorError, OSError) as e:
                self._files.close()
                raise Damaged(f"{name} cannot be read ({e})") from None
            for key in file.keys():
                state, start, parameter = key.split(":", 2)
                self.keys.add(state)
                if state == WEIGHT:
                    length = file.get_slice(key).get_shape()[0]
                    self._ranges[parameter].append((int(start), int(start) + length, file))
        self._check_cover()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements start to stop of a flattened parameter: fp32 [stop - start], on the CPU."""
        found = torch.empty(stop - start)
        for first, last, file in self._ranges[name]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                held = file.get_slice(fragment_key(state, first, name))
                found[low - start : high - start] = held[low - first : high - first]
        return found

    def weights(self) -> dict[str, Tensor]:
        """All weights by their Hugging Face names, fp32, on the CPU."""
        return {
            name: self.read(name, WEIGHT, 0, prod(shape)).view(shape)
            for name, shape in self.index.parameters.items()
        }

    def _check_cover(self) -> None:
        for name, ranges in self._ranges.items():
            ranges.sort(key=lambda r: r[:2])
            at = 0
            for start, stop, _ in ranges:
                if start != at:
                    break
                at = stop
            if at != prod(self.index.parameters[name]):
                self._files.close()
                raise Damaged(f"its files do not hold the whole of {name}")
