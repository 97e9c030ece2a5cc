"""Chooses the checkpoint to go on from, and loads it into an engine of any layout."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping

import torch
import torch.distributed as dist

from est_ds.checkpoints.index import Damaged, Index, read_index
from est_ds.checkpoints.reader import (
    Checkpoint,
    Contents,
    Range,
    check_cover,
    contents,
    file_damage,
)
from est_ds.checkpoints.store import LATEST, Store, tag_of
from est_ds.engine.base import Engine
from est_ds.errors import UserError
from est_ds.ranks.gather import dealt, first_of_all, gathered_on_rank_0, of_rank_0
from est_ds.ranks.world import say
from est_ds.slicing.weights import Weights


def load_checkpoint(engine: Engine, store: Store, index: Index) -> None:
    """Loads weights, moments and counters into an engine of any layout. Every rank calls it.

    Args:
        index: with this rank's part of the files, as `choose_checkpoint` gives it.

    Raises:
        UserError: the checkpoint is of another model.
    """
    checkpoint = store.path(index.step)
    for name, shape in engine.fragments.shapes.items():
        if (written := index.parameters.get(name)) != shape:
            raise UserError(
                f"{checkpoint} is of another model: {name} has the shape {written} there, and "
                f"{shape} in this run; choose another run_dir."
            )
    wanted = [(part.name, part.start, part.stop) for part in engine.fragments.held()]
    known = contents_for(contents(checkpoint, index.files), wanted)
    with Checkpoint(checkpoint, index, known) as held:
        _fill(engine, held, index.state.optimizer_steps, index.state.births)
        engine.set_steps_done(index.step)


def contents_for(own: Contents, wanted: list[tuple[str, int, int]]) -> Contents:
    """What a rank is to read, of files whose headers all ranks have read together. Every rank calls
    it.

    So no rank opens, or hears of, all files: rank 0 gathers what is where, and tells each rank of
    the ranges that it wants.

    Args:
        own: of this rank's part of the files.
        wanted: names of parameters, each with first element and end.

    Raises:
        Damaged: the files do not hold all of it.
    """
    everyone, answers = gathered_on_rank_0((own, wanted)), None
    if everyone:
        keys = {key for found, _ in everyone for key in found.keys}
        where: dict[str, list[Range]] = {}
        for found, _ in everyone:
            for name, ranges in found.ranges.items():
                where.setdefault(name, []).extend(ranges)
        for ranges in where.values():
            ranges.sort()
        answers = (Contents(keys, _overlapping(where, wishes)) for _, wishes in everyone)
    told = dealt(answers)
    for name, start, stop in wanted:
        check_cover(name, told.ranges.get(name, []), start, stop)
    return told


def _overlapping(
    where: Mapping[str, list[Range]], wanted: list[tuple[str, int, int]]
) -> dict[str, list[Range]]:
    """The ranges, of sorted ones that do not overlap each other, that hold what is wanted."""
    found: dict[str, list[Range]] = {}
    for name, start, stop in wanted:
        ranges = where.get(name, [])
        first = bisect_right(ranges, start, key=lambda r: r.stop)
        last = bisect_left(ranges, stop, key=lambda r: r.start)
        found.setdefault(name, []).extend(ranges[first:last])
    return found


def load_weights(engine: Engine) -> None:
    """Loads the published weights that a run begins with into an engine of any layout, with zero
    moments. Every rank calls it."""
    _fill(engine, engine.design.weights(), 0, {})


def _fill(
    engine: Engine, held: Checkpoint | Weights, steps: int, births: Mapping[str, int]
) -> None:
    """Writes what is held into an engine: the one way in, whatever it comes from.

    Args:
        steps: AdamW's count.
        births: see `State.births`.
    """
    with torch.no_grad():
        for fragment in engine.fragments.held():
            if fragment.name not in held.names:
                continue  # of a layer that is still to come
            for key, tensor in fragment.states.items():
                if key in held.keys:
                    tensor.copy_(held.read(fragment.name, key, fragment.start, fragment.stop))
                else:  # elements did not count their own steps, and go on so; or nothing did
                    tensor.fill_(steps - born(births, fragment.name))
    engine.fragments.commit(steps, births)


def born(births: Mapping[str, int], name: str) -> int:
    """AdamW's count of steps when the moments of a parameter were zero."""
    return max((step for path, step in births.items() if name.startswith(path)), default=0)


def choose_checkpoint(store: Store, resume: str) -> Index | None:
    """Returns the checkpoint to resume from, its files hashed; all ranks call it, sharing the work.

    Args:
        resume: `auto` goes back to the newest good one and says so; `latest` takes only what
            `latest` names.

    Returns:
        What it holds; None where there is none.

    Raises:
        UserError: none is good, or with `latest` that one is not.
    """
    candidates = store.candidates()
    if resume == "latest" and candidates:
        candidates = [named] if (named := store.named(LATEST)) is not None else []
        if not candidates:
            raise UserError(
                f"resume=latest: {store.folder / LATEST} names no checkpoint; write one of "
                f"{[tag_of(step) for step in store.steps()]} into it, or set resume=auto."
            )
    broken: dict[int, str] = {}
    is_first = dist.get_rank() == 0
    for step in of_rank_0(candidates):
        index, wrong = _inspect(store, step)
        if wrong is None:
            for bad, text in broken.items():
                aside = store.set_aside(bad) if is_first else None
                say(f"warning: {text}; resuming from step {step} instead, and it is now {aside}")
            if broken and is_first:
                store.point_to(step)  # else later ones, of a run that went back, would count again
            return index
        broken[step] = f"checkpoint {store.path(step)} is damaged: {wrong}"
    if not broken:
        return None
    raise UserError(
        f"{'; '.join(broken.values())}. Set resume=auto to use the newest good one, or start a new "
        f"run_dir."
        if resume == "latest"
        else f"no checkpoint of the run is good: {'; '.join(broken.values())}. Start a new run_dir."
    )


def _inspect(store: Store, step: int) -> tuple[Index | None, str | None]:
    """Returns what a checkpoint holds, and what is wrong with it. Each rank looks at its part of
    the files, and rank 0 alone reads `checkpoint.json`.

    Returns:
        With the files of this rank's part only.
    """
    index, wrong, parts = None, None, None
    if dist.get_rank() == 0:
        try:
            index = read_index(store.path(step))
        except Damaged as e:
            wrong = str(e)
        else:
            files, size = sorted(index.files.items()), dist.get_world_size()
            parts = [dict(files[rank::size]) for rank in range(size)]
            index = index.model_copy(update={"files": {}})
    index, wrong = of_rank_0((index, wrong))
    if index is None:
        return None, wrong
    index = index.model_copy(update={"files": dealt(parts)})
    found = first_of_all(file_damage(store.path(step), index))
    return index, found and found[1]
