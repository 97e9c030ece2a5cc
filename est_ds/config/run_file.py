"""Reads a run file and applies dotted overrides."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from est_ds.config import presets
from est_ds.config.kinds import is_url
from est_ds.config.published import CONFIG, FROM, SHA256, anchored, of_training, with_weights
from est_ds.config.run_config import RunConfig
from est_ds.config.sections import AUTO
from est_ds.config.strict import checked
from est_ds.config.yaml12 import MAX_DEPTH, parse, read_mapping
from est_ds.errors import UserError, without_keys

SECTIONS = ("model", "method", "data")  # that may stand in files of their own
REPLACING = ("method.name", f"model.{FROM}")  # fields with which another section begins
# Fields that name files or folders.
PATHS = (
    "run_dir",
    *SECTIONS,
    "model.from",
    "data.train",
    "data.train.*.corpus",
    "data.valid",
    "data.valid.*",
    "data.tokenizer",
    "checkpoint.copy_to",
)


def load_run(path: str | os.PathLike, overrides: list[str] | None = None) -> RunConfig:
    """Reads a run file, or the `config.yaml` of a run directory, and applies the overrides.

    `~` and `$VARIABLE` in paths are replaced, except in a run directory's `config.yaml`, whose
    paths were replaced when it was written.

    Args:
        path: a file or a run directory, or the name of a run file that est_ds ships.
        overrides: `section.field=value`, the value in YAML. `model`, `method` and `data` may be
            the path of a file that holds the section; `model` also a folder with a `config.json`
            of Hugging Face. A new `method.name` replaces the whole method section, since the
            other method's settings cannot take effect; and `model.from` the whole model section,
            since the weights come with their config (see `in_effect`). `steps` takes the place of
            the file's `tokens`, and `tokens` that of its `steps`.

    Raises:
        UserError: a file is missing or no YAML mapping, or a field is wrong.
    """
    if not os.fspath(path):
        raise UserError("RUN is empty; give a run file (YAML) or a run directory.")
    if is_url(os.fspath(path)):
        raise UserError(
            f"RUN={without_keys(os.fspath(path))!r} is an address; give a run file (YAML) or a run "
            f"directory on this machine. With checkpoint.copy_to=ADDRESS est-ds train fetches the "
            f"checkpoints of a run."
        )
    path = presets.run_file(Path(path))
    if path.is_dir():
        tree = _run_directory(path)
    else:
        tree = expanded(read_mapping(path, "run file"), PATHS)
        if {"study_dir", "arms"} <= tree.keys():
            raise UserError(
                f"run file {str(path)!r} is a study file (it has study_dir and arms), which "
                f"est-ds compare takes; give a run file (YAML) or a run directory."
            )
    # A section may stand in a file of its own: its path is relative to the file naming it, or,
    # in an override, to the working directory.
    read_sections(tree, path if path.is_dir() else path.parent)
    _let_length_replace(tree, overrides or [])
    for override in overrides or []:
        _override(tree, override)
        read_sections(tree, Path())
    _keep_micro(tree)
    if not path.is_dir():
        _choose_held_out(tree)
    model = tree.get("model")
    if isinstance(model, dict) and not (path.is_dir() and SHA256 in model):
        tree["model"] = with_weights(model, tree.get("run_dir"))
    return checked(RunConfig, tree)


def in_effect(overrides: list[str]) -> list[str]:
    """What is given at once, in an order in which none is lost: `method.name` and `model.from`,
    which replace their section, before other fields of it."""
    ordered: list[str] = []
    for override in overrides:
        field, place = override.partition("=")[0], len(ordered)
        section = field.partition(".")[0]
        for i in reversed(range(len(ordered) if field in REPLACING else 0)):
            other = ordered[i].partition("=")[0]
            if other in (section, field):
                break
            if other.startswith(f"{section}."):
                place = i
        ordered.insert(place, override)
    return ordered


def _let_length_replace(tree: dict[str, Any], overrides: list[str]) -> None:
    """Leaves the file's `steps` out where an override gives `tokens`, and the other way round."""
    given = {override.partition("=")[0] for override in overrides}
    for own, other in (("steps", "tokens"), ("tokens", "steps")):
        if own in given and other not in given:
            tree.pop(other, None)


def _choose_held_out(tree: dict[str, Any]) -> None:
    """Sets `evaluate.choice` where a run file does not: as in `run_dir`, or `even`."""
    evaluate, run_dir = tree.get("evaluate"), tree.get("run_dir")
    if not isinstance(evaluate, dict) or "choice" in evaluate or not isinstance(run_dir, str):
        return
    try:
        began = _section_of_begun(run_dir, "evaluate")
        evaluate["choice"] = "even" if began is None else began.get("choice", "first")
    except (OSError, UserError, KeyError, AttributeError):
        return  # `run.directory.check_run_dir` says what is wrong with it


def _keep_micro(tree: dict[str, Any]) -> None:
    """Sets `batch.micro` where it is `auto` and a run that has begun found it out."""
    batch, run_dir = tree.get("batch"), tree.get("run_dir")
    if not isinstance(batch, dict) or batch.get("micro") != AUTO or not isinstance(run_dir, str):
        return
    try:
        began = _section_of_begun(run_dir, "batch")
        batch["micro"] = AUTO if began is None else began["micro"]
    except (OSError, UserError, KeyError, TypeError):
        return  # as above


def _section_of_begun(run_dir: str, section: str) -> Any:
    """A section of the `config.yaml` of a run directory; None if there is none."""
    config = Path(run_dir) / "config.yaml"
    return read_mapping(config, "run file")[section] if config.is_file() else None


def _run_directory(directory: Path) -> dict[str, Any]:
    file = directory / "config.yaml"
    if not file.exists():
        raise UserError(
            f"{str(directory)!r} is no run directory: it holds no config.yaml; give a run file "
            f"(YAML), or the run_dir of a run that has started."
        )
    return read_mapping(file, "run file") | {"run_dir": str(directory)}


def expanded(value: Any, paths: tuple[str, ...], field: str = "") -> Any:
    """`value` with `~` and `$VARIABLE` replaced in the texts of fields that are `paths`.

    Args:
        field: dotted name of `value`; empty for a whole file.

    Raises:
        UserError: a variable is not set, or a user is not known.
    """
    if isinstance(value, dict):
        return {k: expanded(v, paths, f"{field}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [expanded(v, paths, f"{field}.{i}") for i, v in enumerate(value)]
    if not isinstance(value, str) or not any(fnmatch(field, path) for path in paths):
        return value
    for name, braced in re.findall(r"\$(?:(\w+)|\{([^}]*)\})", value):
        if (name or braced) not in os.environ:
            raise UserError(
                f"{field}={value!r}: the environment variable {name or braced!r} is not set; set "
                f"it, or write the path out."
            )
    found = os.path.expanduser(os.path.expandvars(value))
    if value.startswith("~") and found.startswith("~"):
        raise UserError(f"{field}={value!r}: {value.split('/')[0]} is no user's folder here.")
    return found


def read_sections(tree: dict[str, Any], folder: Path) -> None:
    """Puts the sections in place of the paths of their files, which are relative to `folder`.

    Of a `.json` of a model what says nothing of training is left out.

    Raises:
        UserError: a file cannot be read, or holds no section.
    """
    for section in SECTIONS:
        if isinstance(path := tree.get(section), str):
            file, what = folder / path, f"{section} file ({section})"
            if section == "model" and file.is_dir():
                file = file / CONFIG
            read = read_mapping(file, what)
            if section == "model" and file.suffix == ".json":
                read = of_training(read)
            tree[section] = expanded(read, PATHS, section)
            if section == "model":
                anchored(tree[section], file.parent)
    if isinstance(model := tree.get("model"), dict):
        anchored(model, folder)


def _override(tree: dict[str, Any], override: str) -> None:
    field, equals, text = override.partition("=")
    if not equals or not field:
        raise UserError(f"override {override!r}: write section.field=value, for example steps=100.")
    try:
        value = parse(text)
    except UserError as e:
        raise UserError(f"override {override!r:.80}: {e}.") from None
    value = expanded(value, PATHS, field)
    *path, last = re.sub(r"\[(\d+)\]", r".\1", field).split(".")  # as messages write it
    if len(path) > MAX_DEPTH:
        raise UserError(f"override {override!r:.80}: no field lies so deep; see the run file.")
    if field == "method.name":
        section = tree.get("method")
        if not isinstance(section, dict) or section.get("name") != value:
            tree["method"] = {"name": value}
        return
    if field == f"model.{FROM}":
        tree["model"] = {FROM: value}
        return
    node: Any = tree
    for depth, part in enumerate(path):
        if isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            node = _item(node, part, override)
        if not isinstance(node, (dict, list)):
            above = ".".join(path[: depth + 1])
            raise UserError(f"override {override!r}: {above} is {node!r}, not a section.")
    if isinstance(node, dict):
        node[last] = value
    else:
        _item(node, last, override)
        node[int(last)] = value


def _item(node: list, part: str, override: str) -> Any:
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(node):
        raise UserError(
            f"override {override!r:.80}: {part!r:.40} is not a position in a list of {len(node)}; "
            f"use 0 to {len(node) - 1}."
        )
    return node[int(part)]
