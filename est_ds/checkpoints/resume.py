"""Chooses the checkpoint to go on from, and loads it into an engine of any layout."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from est_ds.checkpoints.reader import Checkpoint, damage
from est_ds.checkpoints.store import LATEST, Store, tag_of
from est_ds.checkpoints.writer import _gathered
from est_ds.engine.base import Engine
from est_ds.errors import UserError
from est_ds.ranks.world import say


def load_checkpoint(engine: Engine, checkpoint: Path) -> None:
    """Loads weights, moments and counters into an engine of any layout. Every rank calls it.

    Raises:
        UserError: the checkpoint is of another model.
    """
    with Checkpoint(checkpoint) as held:
        written = held.index.parameters
        for name, shape in engine.fragments.shapes.items():
            if written.get(name) != shape:
                raise UserError(
                    f"{checkpoint} holds {name} as {written.get(name)}, and the model of this run "
                    f"has it as {shape}; choose another run_dir."
                )
        with torch.no_grad():
            for fragment in engine.fragments.held():
                for key, tensor in fragment.states.items():
                    tensor.copy_(held.read(fragment.name, key, fragment.start, fragment.stop))
        engine.fragments.commit(held.index.state["optimizer_steps"])
        engine.set_steps_done(held.index.step)


def choose_checkpoint(store: Store, resume: str) -> int | None:
    """The checkpoint to resume from, its files hashed; every rank calls it, sharing the work.

    Args:
        resume: `auto` goes back to the newest good one and says so; `latest` takes only what
            `latest` names.

    Returns:
        Its step; None where there is none.

    Raises:
        UserError: none is good, or with `latest` that one is not.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    candidates = store.candidates()
    if resume == "latest" and candidates:
        candidates = [named] if (named := store.named(LATEST)) is not None else []
        if not candidates:
            raise UserError(
                f"resume=latest: {store.folder / LATEST} names no checkpoint; write one of "
                f"{[tag_of(step) for step in store.steps()]} into it, or set resume=auto."
            )
    broken: dict[int, str] = {}
    for step in _gathered(candidates)[0]:
        found = _gathered(damage(store.path(step), (rank, num_ranks)))
        wrong = next((text for text in found if text), None)
        if wrong is None:
            for bad, text in broken.items():
                aside = store.set_aside(bad) if rank == 0 else None
                say(f"warning: {text}; resuming from step {step} instead, and it is now {aside}")
            if broken and rank == 0:
                store.point_to(step)  # else later ones, of a run that went back, would count again
            return step
        broken[step] = f"checkpoint {store.path(step)} is damaged: {wrong}"
    if not broken:
        return None
    raise UserError(
        f"{'; '.join(broken.values())}. Set resume=auto to use the newest good one, or start a new "
        f"run_dir."
        if resume == "latest"
        else f"no checkpoint of the run is good: {'; '.join(broken.values())}. Start a new run_dir."
    )
