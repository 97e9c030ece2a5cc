"""The run directory: whose it is, who may write it, and the config in it."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

from est_ds.config.corpora import Data
from est_ds.config.kinds import absolute
from est_ds.config.run_config import RunConfig
from est_ds.config.run_file import load_run
from est_ds.disk import hold, replace_text
from est_ds.errors import UserError
from est_ds.run.metrics import FILE, read_metrics

LOCK = ".lock"
UNBEGUN = (LOCK, ".config.yaml.partial")  # of a run killed before it had a config.yaml

# Fields that a resumed run may change; all others make it another run. Corpora may move: the
# checkpoint holds their fingerprints. So may weights, whose hash is a field.
FREE_TO_CHANGE = (
    "run_dir",
    "model.from",
    "parallel.*",
    "batch.micro",
    "checkpoint.*",
    "resume",
    "evaluate.*",
    "log.*",
    "watchdog.*",
    "divergence.*",
    "activation_checkpointing",
    "compile",
    "data.train",
    "data.train.*.corpus",
    "data.valid",
    "data.valid.*",
    "data.tokenizer",
    "data.verify",
    "deepspeed.*",
)


def check_run_dir(config: RunConfig) -> None:
    """Refuses a run directory that belongs to another run, or has lost its checkpoints.

    A run that never trained a step may still change.

    Raises:
        UserError: it holds another run, or files that are no run's; or it cannot be read.
    """
    try:
        if (Path(config.run_dir) / "config.yaml").exists():
            _check_same_run(config)
        else:
            _check_unused(config)
    except OSError as e:
        raise UserError(
            f"run_dir={config.run_dir!r} cannot be read ({e.strerror}: {e.filename}); mend that, "
            f"or choose another run_dir."
        ) from None


def _check_unused(config: RunConfig) -> None:
    directory = Path(config.run_dir)
    if directory.exists() and (
        not directory.is_dir() or any(p.name not in UNBEGUN for p in directory.iterdir())
    ):
        raise UserError(
            f"run_dir={config.run_dir!r} exists and is no run directory (it has no "
            f"config.yaml); choose another run_dir, or move it away."
        )


def _check_same_run(config: RunConfig) -> None:
    directory = Path(config.run_dir)
    former = load_run(directory)
    differing = differences(former, config)
    begun = (directory / "checkpoints" / "latest").exists() or (directory / FILE).exists()
    if differing and begun:
        shown = "; ".join(differing[:3])
        if more := [text.partition(" is ")[0] for text in differing[3:]]:
            shown += f"; and {', '.join(more)}"
        raise UserError(
            f"run_dir={config.run_dir!r} holds a run of another config: {shown}. These fields of a "
            f"run never change, so that it is neither extended nor altered: train another one in "
            f"another run_dir (run_dir=NEW), begin one with a checkpoint of it (est-ds branch "
            f"{config.run_dir} --at STEP --run-dir NEW), or resume this one as it is: est-ds train "
            f"{config.run_dir}"
        )
    if config.checkpoint.copy_to is None or config.resume == "latest":  # else they come from there
        check_not_lost(former)


def check_not_lost(config: RunConfig) -> None:
    """Refuses a run directory that has lost its checkpoints.

    Args:
        config: the one in it.

    Raises:
        UserError: the run has trained, and there is none.
    """
    directory = Path(config.run_dir)
    checkpoints = directory / "checkpoints"
    if any(checkpoints.glob("*step_*")):
        return
    steps, _ = read_metrics(directory)
    # By then one is complete: the next waits for it.
    if steps and (not checkpoints.is_dir() or steps[-1]["step"] >= 2 * config.checkpoint.every):
        raise UserError(
            f"run_dir={config.run_dir!r} has trained {steps[-1]['step'] + 1} steps, and "
            f"{str(checkpoints)!r} holds no checkpoint: moved away, or not mounted. Put it back, "
            f"or choose another run_dir to begin anew."
        )


def lock_run_dir(config: RunConfig) -> TextIO:
    """Takes the run directory for this process until the file is closed, or the process ends.

    Raises:
        UserError: another process trains it, or it or one of its folders cannot be written.
    """
    folder = directory = Path(config.run_dir)
    try:
        lock = hold(directory / LOCK)
        for folder in (directory, directory / "checkpoints", directory / "tensorboard"):
            if os.path.lexists(folder):
                TemporaryFile(dir=folder).close()
        return lock
    except BlockingIOError:
        raise UserError(
            f"run_dir={config.run_dir!r} is being trained by another process; wait for it, stop "
            f"it, or choose another run_dir."
        ) from None
    except OSError as e:
        raise UserError(
            f"run_dir={config.run_dir!r}: {str(folder)!r} cannot be written ({e.strerror}); mend "
            f"that, or choose another run_dir."
        ) from None


def write_config(config: RunConfig, directory: Path | None = None) -> None:
    """Saves the resolved config in the run directory, whole or not at all.

    Args:
        directory: where the run directory is until it gets its name; `run_dir` if None.
    """
    directory = directory or Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    # Absolute, so that the run can be resumed from any working directory.
    absolute = config.model_copy(update={"data": _with_absolute_paths(config.data)})
    replace_text(directory / "config.yaml", absolute.to_yaml())


def _with_absolute_paths(data: Data) -> Data:
    train, valid = data.train, data.valid
    if isinstance(train, str):
        train = absolute(train)
    else:
        train = tuple(p.model_copy(update={"corpus": absolute(p.corpus)}) for p in train)
    if isinstance(valid, str):
        valid = absolute(valid)
    else:
        valid = {name: absolute(prefix) for name, prefix in valid.items()}
    paths = {"train": train, "valid": valid, "tokenizer": absolute(data.tokenizer)}
    return data.model_copy(update=paths)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested sections by their dotted names."""
    if isinstance(tree, (list, tuple)) and any(isinstance(part, dict) for part in tree):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        return {
            k: v
            for key, sub in tree.items()
            for k, v in flat(sub, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}


def fixed_fields(config: RunConfig, *, defaults: bool = True) -> dict[str, Any]:
    """The fields that a run never changes, dotted, with their values.

    Args:
        defaults: false leaves out those that have their default.
    """
    fields = flat(config.model_dump(by_alias=True, exclude_defaults=not defaults))
    free = _free_to_change(config)
    return {k: v for k, v in fields.items() if not _matches(k, free)}


def _free_to_change(config: RunConfig) -> set[str]:
    """Patterns of the fields that a run may change."""
    from est_ds.slicing.families import hf_config
    from est_ds.slicing.families.fields import dropout_of

    free = set(FREE_TO_CHANGE)
    if config.method.get("draw") == "micro_batch" or dropout_of(hf_config(config.model)):
        free.discard("batch.micro")  # each has a plan, or masks, of its own
    return free


def _matches(field: str, patterns: set[str]) -> bool:
    return any(fnmatch(field, pattern) for pattern in patterns)


def changed_fields(there: RunConfig, here: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, by their dotted names, each with both values (None: it is not there)."""
    former, now = (flat(config.model_dump(by_alias=True)) for config in (there, here))
    keys = sorted(former.keys() | now.keys())
    return {k: (former.get(k), now.get(k)) for k in keys if former.get(k) != now.get(k)}


def differences(there: RunConfig, here: RunConfig) -> list[str]:
    """Fields that make one run another than the other, each with both values."""
    free = _free_to_change(here)
    return [
        f"{key} is {former!r} there and {now!r} here"
        for key, (former, now) in changed_fields(there, here).items()
        if not _matches(key, free)
    ]
