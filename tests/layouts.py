"""Layouts that must not matter, and runs in all of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

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
