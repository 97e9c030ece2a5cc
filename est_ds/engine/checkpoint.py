"""Checkpoints that are complete or absent.

DeepSpeed writes into `.step_XXXXXXXX.partial`; when every rank is done, rank 0 adds
`checkpoint.json` (sizes of all files, the layout) and renames the folder; `latest` moves last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from est_ds.engine.base import Engine
from est_ds.engine.setup import quiet
from est_ds.errors import UserError

INDEX = "checkpoint.json"
TAG = re.compile(r"step_(\d{8})")


def latest_step(folder: Path) -> int | None:
    """The step (number of steps done) that `latest` names; None without a checkpoint.

    Raises:
        UserError: `latest` names nothing that is there.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    tag = pointer.read_text().strip()
    match = TAG.fullmatch(tag)
    if not match or not (folder / tag / INDEX).is_file():
        there = sorted(p.name for p in folder.glob("step_*") if (p / INDEX).is_file())
        raise UserError(
            f"{pointer} names {tag!r}, which is no complete checkpoint; write one of "
            f"{there or 'none (start a new run directory)'} into it."
        )
    return int(match[1])


def save_checkpoint(engine: Engine, folder: Path, step: int, state: dict[str, Any]) -> None:
    """Saves after `step` steps. Every rank calls it."""
    tag = f"step_{step:08d}"
    partial = f".{tag}.partial"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.partial"):
            shutil.rmtree(left, ignore_errors=True)
    dist.barrier()
    with quiet():
        engine.save(folder, partial, state)
    dist.barrier()
    if dist.get_rank() == 0:
        for script in ("zero_to_fp32.py", "zero_to_torch.py"):
            # DeepSpeed's converters, which fail on pipelines; `est-ds export` does not.
            (folder / script).unlink(missing_ok=True)
        _complete(folder / partial, folder / tag, step, engine.layout)
        replace_text(folder / "latest", tag + "\n")
        _forget(folder, keep=engine.config.checkpoint.keep)
    dist.barrier()


def load_checkpoint(engine: Engine, folder: Path, step: int) -> dict[str, Any]:
    """Loads the checkpoint after `step` steps; returns the state given to `save_checkpoint`.

    Raises:
        UserError: a file is missing or truncated, or another layout wrote it.
    """
    check_resumable(folder, step, engine.layout)
    with quiet():
        return engine.load(folder, f"step_{step:08d}")


def check_resumable(folder: Path, step: int, layout: dict[str, int]) -> None:
    """Checks a checkpoint before anything is started.

    Raises:
        UserError: a file is missing or truncated, or another layout wrote it.
    """
    checkpoint = folder / f"step_{step:08d}"
    check_files(checkpoint)
    written = json.loads((checkpoint / INDEX).read_text())["layout"]
    if written != layout:
        raise UserError(
            f"{checkpoint} was written with {_words(written)}, and this start has "
            f"{_words(layout)}; start it with --processes {written['pipe'] * written['replicas']} "
            f"parallel.pipe={written['pipe']} parallel.zero={written['zero']}."
        )


def check_files(checkpoint: Path) -> None:
    """Compares the files with `checkpoint.json`.

    Raises:
        UserError: one is missing or has another size.
    """
    for name, size in json.loads((checkpoint / INDEX).read_text())["files"].items():
        file = checkpoint / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise UserError(
                f"checkpoint {checkpoint}: {name} {state}; write the name of another checkpoint "
                f"into {checkpoint.parent / 'latest'}."
            )


def replace_text(file: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    beside = file.with_name(file.name + ".partial")
    beside.write_text(text)
    os.replace(beside, file)


def _complete(partial: Path, final: Path, step: int, layout: dict[str, Any]) -> None:
    files = {
        str(p.relative_to(partial)): p.stat().st_size
        for p in sorted(partial.rglob("*"))
        if p.is_file()
    }
    index = {"format": 1, "step": step, "layout": layout, "files": files}
    replace_text(partial / INDEX, json.dumps(index, indent=1))
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)


def _forget(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints (0: removes none)."""
    tags = sorted(p for p in folder.glob("step_*") if TAG.fullmatch(p.name))
    for old in tags[: len(tags) - keep] if keep else []:
        shutil.rmtree(old)


def _words(layout: dict[str, Any]) -> str:
    return (
        f"parallel.pipe={layout['pipe']}, parallel.zero={layout['zero']} and "
        f"{layout['replicas']} replicas"
    )
