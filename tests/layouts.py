"""Layouts that must not matter, a run whose losses hold on any machine, and runs in all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import yaml

from cases.tiny import TINY_MODEL, TINY_RUN
from workers import train_all

# processes and overrides
LAYOUTS = {
    "1 process": (1, ["parallel.pipe=1", "parallel.zero=0"]),
    "data 2, ZeRO 0": (2, ["parallel.pipe=1", "parallel.zero=0"]),
    "data 2, ZeRO 1": (2, ["parallel.pipe=1", "parallel.zero=1"]),
    "data 2, ZeRO 2": (2, ["parallel.pipe=1", "parallel.zero=2"]),
    "data 2, ZeRO 3": (2, ["parallel.pipe=1", "parallel.zero=3"]),
    "pipe 2, ZeRO 0": (2, ["parallel.pipe=2", "parallel.zero=0"]),
    "pipe 2 x data 2, ZeRO 1": (4, ["parallel.pipe=2", "parallel.zero=1"]),
    "pipe 4, ZeRO 1": (4, ["parallel.pipe=4", "parallel.zero=1"]),
}
# Tried by fewer tests.
MORE_LAYOUTS = {
    "pipe 2, ZeRO 1": (2, ["parallel.pipe=2", "parallel.zero=1"]),
    "pipe 2, checkpointing": (
        2, ["parallel.pipe=2", "parallel.zero=1", "activation_checkpointing=true"]
    ),
    "data 2, ZeRO 3, checkpointing": (
        2, ["parallel.pipe=1", "parallel.zero=3", "activation_checkpointing=true"]
    ),
    "data 2, ZeRO 2, offload": (
        2, ["parallel.pipe=1", "parallel.zero=2", "parallel.offload=true"]
    ),
    "data 2, ZeRO 3, offload": (
        2, ["parallel.pipe=1", "parallel.zero=3", "parallel.offload=true"]
    ),
    "pipe 2 x data 3, ZeRO 1": (6, ["parallel.pipe=2", "parallel.zero=1"]),
}  # fmt: skip

METHODS = {
    "full": "{name: full}",
    "est": (
        "{name: est, balance_groups: 4, phases: ["
        "{name: small, until: 8, layers: 0.5, heads: 0.5, columns: 0.5}, "
        "{name: narrow, until: 14, heads: 0.5, columns: 0.5}, {name: full, until: 20}]}"
    ),
    # Not balanced: some of its plans leave a pipe stage of two layers without any.
    "raptr": (
        "{name: raptr, phases: [{until: 8, layers: 0.5}, {until: 14, layers: 0.75}, {until: 20}]}"
    ),
}


# Weights in bf16 have 8 bits: a sum in another order may round one of them the other way, and these
# losses fall by a third in five steps.
BF16_BOUND = 1e-3


class Lazily(dict):
    """What `make` returns for a key, made when the key is first asked for."""

    def __init__(self, make: Callable) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key):
        self[key] = self._make(key)
        return self[key]


def write_run(folder: Path) -> Path:
    """A run file on tokens drawn from a fixed Markov chain."""
    import torch
    from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import (
        MMapIndexedDatasetBuilder,
    )

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.Generator(np.random.Philox(key=5))
    steps = draw.integers(1, 9, 40_000)  # an even chain: each token is one of eight after the last
    tokens = (np.cumsum(steps * steps) % 61).astype(np.int32)
    for name, part in (("train", tokens[:30_000]), ("valid", tokens[30_000:])):
        builder = MMapIndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.int32)
        for document in np.array_split(part, 10):
            builder.add_item(torch.from_numpy(document))
            builder.end_document()
        builder.finalize(str(folder / f"{name}.idx"))
    # The corpus names no tokenizer, and none is ever read.
    (folder / "tokenizer.model").write_bytes(b"none")
    data = {"train": str(folder / "train"), "valid": str(folder / "valid")}
    tree = {
        "run_dir": "unset",
        **TINY_RUN,
        "model": {**TINY_MODEL, "num_hidden_layers": 8},
        "optimizer": {"lr": 1e-2},
        "data": {**data, "tokenizer": str(folder), "sequence": 64},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def name_of(*parts: str) -> str:
    """A folder's name."""
    return "-".join("".join(c for c in part if c.isalnum() or c == " ") for part in parts).replace(
        " ", "_"
    )


def train_in(
    folder: Path,
    run: Path,
    cases: Iterable[tuple[str, str, list[str]]],
    timeout_s: float = 600,
) -> list[Path]:
    """Trains runs of (layout, name, overrides), with one start for every number of processes.

    Args:
        timeout_s: of each start.

    Returns:
        The run directories, in the order of the cases.
    """
    jobs: dict[int, list[dict]] = {}
    directories = []
    for layout, name, overrides in cases:
        processes, arguments = {**LAYOUTS, **MORE_LAYOUTS}[layout]
        directories.append(folder / name_of(layout, name))
        jobs.setdefault(processes, []).append(
            {"run": run, "overrides": [f"run_dir={directories[-1]}", *arguments, *overrides]}
        )
    for processes, some in jobs.items():
        train_all(folder / f"processes_{processes}", processes, some, timeout_s)
    return directories
