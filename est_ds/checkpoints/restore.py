"""Brings a checkpoint back from the bucket where it was copied to, if that has a newer one."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch.distributed as dist

from est_ds.checkpoints.bucket import BESIDE, FIELD, Bucket
from est_ds.checkpoints.index import FILE, Index
from est_ds.checkpoints.resume import choose_checkpoint
from est_ds.checkpoints.store import Store, tag_of
from est_ds.config.run_config import RunConfig
from est_ds.config.run_file import load_run
from est_ds.config.strict import checked
from est_ds.data.remote import RemoteError, RemoteMissing, persistent
from est_ds.disk import File, describe, replace_bytes, replace_text, sync_folder
from est_ds.errors import Failure, UserError, gigabytes
from est_ds.ranks.gather import dealt, first_of_all, of_rank_0, on_threads
from est_ds.ranks.world import say
from est_ds.run.directory import check_not_lost, differences, write_config


def choose_or_restore(store: Store, config: RunConfig, goes_on: Callable[[], None]) -> Index | None:
    """As `choose_checkpoint`; with `resume: auto` and `checkpoint.copy_to` a newer copy in the
    bucket is brought back first. Every rank calls it.

    Args:
        goes_on: called every second while something is fetched.

    Raises:
        UserError: as of `choose_checkpoint`; or the bucket holds copies of another run.
        Failure: nothing is here, and the bucket cannot be read.
    """
    if config.checkpoint.copy_to is None:
        return choose_checkpoint(store, config.resume)
    bucket = Bucket(config.checkpoint.copy_to)
    copy, unread = _newest(bucket, None, goes_on)
    if unread:
        say(f"warning: {unread}")
    if copy:
        _check_same_run(copy, config)
    if config.resume == "latest":
        return choose_checkpoint(store, config.resume)
    while True:
        found, damaged = None, None
        try:
            found = choose_checkpoint(store, config.resume)
        except UserError as e:
            damaged = e
        if copy is None or (found and copy.step <= found.step):
            break
        if wrong := _restore(store, bucket, copy, config, goes_on):
            unread = f"checkpoint {copy.step} could not be fetched ({wrong})"
            say(f"warning: {unread}")
        copy, _ = _newest(bucket, copy.step, goes_on)
    if found is None and unread:
        raise Failure(
            f"{FIELD}: {unread}; and {str(store.folder)!r} holds no good checkpoint. Mend that and "
            f"start the run again, or begin it anew with another {FIELD} and run_dir."
        )
    if damaged:
        raise damaged
    if found is None and (store.folder.parent / "config.yaml").exists():
        check_not_lost(load_run(store.folder.parent))
    return found


def _newest(
    bucket: Bucket, before: int | None, goes_on: Callable[[], None]
) -> tuple[Index | None, str | None]:
    """The newest whole copy of fewer steps than `before`, and what kept from looking.

    Returns:
        On rank 0 alone with the files of the copy.
    """
    found: list[tuple[Index | None, str | None]] = []

    def look() -> None:
        try:
            found.append((persistent(lambda: bucket.newest(before)), None))
        except RemoteError as e:
            found.append((None, str(e)))

    on_threads(look if dist.get_rank() == 0 else None, goes_on)
    own, unread = found[0] if found else (None, None)
    told, unread = of_rank_0((own and own.model_copy(update={"files": {}}), unread))
    return own or told, unread


def _check_same_run(copy: Index, config: RunConfig) -> None:
    former = checked(RunConfig, copy.state.config)
    differing = differences(former, config)
    if not differing:
        return
    advice = "Give this run a folder of its own."
    if len(differing) == 1 and differing[0].startswith("batch.micro "):
        advice = (
            f"To go on with that run, give batch.micro={former.batch.micro} of the copy: with "
            f"dropout or draw: micro_batch it is a part of the run. Else give this run a folder of "
            f"its own."
        )
    raise UserError(
        f"{FIELD}={config.checkpoint.copy_to!r} holds checkpoints of a run of another config: "
        f"{'; '.join(differing[:3])} (there: the copies). {advice}"
    )


def _restore(
    store: Store, bucket: Bucket, copy: Index, config: RunConfig, goes_on: Callable[[], None]
) -> str | None:
    """Fetches a copy, each rank its share of the files; returns what went wrong.

    What a killed process has fetched is not fetched again.

    Args:
        copy: as `_newest` gives it.
    """
    is_first, began = dist.get_rank() == 0, time.monotonic()
    folder = store.folder / f".{tag_of(copy.step)}.fetched"
    own: list[str] = []

    def room() -> None:
        write_config(config, store.folder.parent)  # without it what is here would be no run's
        _make_room(store, folder, copy)

    wrong = of_rank_0(_told(room) if is_first else None)
    if not wrong:
        files, size = sorted(copy.files.items()), dist.get_world_size()
        part = dealt([dict(files[rank::size]) for rank in range(size)] if is_first else None)
        on_threads(
            lambda: own.extend(_told(lambda: _fetch(bucket, copy.step, folder, part))), goes_on
        )
        if fault := first_of_all(own[0] if own else None):
            return fault[1]
        complete = partial(_complete, store, bucket, copy, folder)
        wrong = of_rank_0(_told(complete) if is_first else None)
    if wrong:
        return wrong[0]
    size = gigabytes(sum(file.bytes for file in copy.files.values()))
    took = time.monotonic() - began
    say(f"checkpoint {copy.step} fetched from {bucket.url} ({size}, {took:.0f} s)")
    return None


def _fetch(bucket: Bucket, step: int, folder: Path, part: dict[str, File]) -> None:
    folder.mkdir(exist_ok=True)  # a shared file system may show it late
    for name, expected in part.items():
        file = folder / name
        if not file.exists() or describe(file) != expected:
            there = f"{tag_of(step)}/{name}"
            persistent(partial(bucket.fetch, there, file, expected, lambda _: None))


def _make_room(store: Store, folder: Path, copy: Index) -> None:
    store.folder.mkdir(parents=True, exist_ok=True)
    for left in store.folder.glob(".*.fetched"):
        if left != folder:
            shutil.rmtree(left)
    folder.mkdir(exist_ok=True)
    here = sum(file.stat().st_size for file in folder.iterdir())
    needed = sum(file.bytes for file in copy.files.values()) - here
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"it takes {gigabytes(needed)} more and {store.folder} has {gigabytes(free)} free"
        )


def _complete(store: Store, bucket: Bucket, copy: Index, folder: Path) -> None:
    """Makes what was fetched the latest checkpoint, and what lay beside it the run's past."""
    directory = store.folder.parent
    for name in BESIDE[1:]:  # the config is the one that is asked for
        with suppress(RemoteMissing):
            content = persistent(partial(bucket.read, f"{tag_of(copy.step)}/{name}"))
            replace_bytes(directory / name, content)
    replace_text(folder / FILE, copy.to_json())
    final = store.path(copy.step)
    if final.exists():
        store.set_aside(copy.step)
    os.replace(folder, final)
    sync_folder(store.folder)
    store.point_to(copy.step)


def _told(work: Callable[[], object]) -> list[str]:
    """What went wrong; nothing if all is well."""
    try:
        work()
    except (RemoteError, OSError) as e:
        return [str(e)]
    return []
