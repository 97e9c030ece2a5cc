"""Reads a run file and applies dotted overrides."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from est_ds.config import RunConfig, checked
from est_ds.errors import UserError


def load_run(path: str | os.PathLike, overrides: list[str] | None = None) -> RunConfig:
    """Reads a run file, or the `config.yaml` of a run directory, and applies the overrides.

    Args:
        overrides: `section.field=value`, the value in YAML. `model`, `method` and `data` may be
            the path of a file that holds the section. A new `method.name` replaces the
            whole method section, since the other method's settings cannot take effect.

    Raises:
        UserError: a file is missing or no YAML mapping, or a field is wrong.
    """
    path = Path(path)
    file = path / "config.yaml" if path.is_dir() else path
    tree = _read_mapping(file, "run file")
    if path.is_dir():
        tree["run_dir"] = str(path)
    # A section may stand in a file of its own: its path is relative to the file naming it, or,
    # in an override, to the working directory.
    _read_sections(tree, file.parent)
    for override in overrides or []:
        _override(tree, override)
        _read_sections(tree, Path())
    if not path.is_dir():
        _choose_held_out(tree)
    return checked(RunConfig, tree)


def _choose_held_out(tree: dict[str, Any]) -> None:
    """Sets `evaluate.choice` where a run file does not: as the run in `run_dir` began, or `even`."""
    evaluate, run_dir = tree.get("evaluate"), tree.get("run_dir")
    if not isinstance(evaluate, dict) or "choice" in evaluate or not isinstance(run_dir, str):
        return
    config = Path(run_dir) / "config.yaml"
    try:
        began = _read_mapping(config, "run file")["evaluate"] if config.is_file() else None
        evaluate["choice"] = "even" if began is None else began.get("choice", "first")
    except (OSError, UserError, KeyError, AttributeError):
        return  # `run_dir.check_run_dir` says what is wrong with it


def _read_sections(tree: dict[str, Any], folder: Path) -> None:
    for section in ("model", "method", "data"):
        if isinstance(path := tree.get(section), str):
            tree[section] = _read_mapping(folder / path, f"{section} file ({section})")


def _read_mapping(file: Path, what: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{what} {str(file)!r} does not exist; check the path.") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{what} {str(file)!r} cannot be read: {e}.") from None
    except yaml.YAMLError as e:
        raise UserError(f"{what} {str(file)!r} is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what} {str(file)!r} must hold a mapping of fields, not {tree!r:.40}.")
    return tree


def _override(tree: dict[str, Any], override: str) -> None:
    field, equals, text = override.partition("=")
    if not equals or not field:
        raise UserError(f"override {override!r}: write section.field=value, for example steps=100.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not YAML; quote it.") from None
    *path, last = field.split(".")
    if field == "method.name":
        section = tree.get("method")
        if not isinstance(section, dict) or section.get("name") != value:
            tree["method"] = {"name": value}
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
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(
            f"override {override!r}: {part!r} is not a position in a list of {len(node)}; "
            f"use 0 to {len(node) - 1}."
        )
    return node[int(part)]
