"""Reads what people write: YAML with the types of YAML 1.2, of which JSON is a part; and writes it.

PyYAML scans and parses; its types are those of YAML 1.1, where `on` is true, `012` is ten and
`1e-3` is text. The types here are those of the core schema (YAML 1.2.2, section 10.3.2). Refused
besides: a key that stands twice, a key that is no text, numbers beyond 64 bits, and texts that no
path can hold. What an alias (`*name`) stands for is a copy: whoever changes one leaves the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from est_ds.errors import UserError

MAX_DEPTH, MAX_VALUES = 64, 1_000_000
_TAG = "tag:yaml.org,2002:"
_CORE = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),  # not in 1.2, but nothing else in a run file looks so
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}
    yaml_constructors = {
        f"{_TAG}{kind}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{kind}"]
        for kind in ("null", "map", "seq")
    } | {None: yaml.SafeLoader.construct_undefined}
    _depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self._depth > MAX_DEPTH:
            raise _Refused(
                problem=f"more than {MAX_DEPTH} levels of lists and mappings in each other",
                problem_mark=self.peek_event().start_mark,
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: str | None) -> MappingNode:
        """Here and not when it is constructed: by then `<<` has put other keys into it."""
        node = super().compose_mapping_node(anchor)
        seen: dict[str, Node] = {}
        for key, _ in node.value:
            if key.tag == f"{_TAG}merge":
                continue
            if key.tag != f"{_TAG}str":
                shown = key.value if isinstance(key, ScalarNode) else "of several values"
                raise _wrong(key, f"the key {shown} is no text; quote it")
            first = seen.setdefault(key.value, key)
            if first is not key:
                raise _wrong(
                    key,
                    f"the key {key.value!r} stands twice, in line {first.start_mark.line + 1} and "
                    f"in line {key.start_mark.line + 1}; keep one of them",
                )
        return node


for _kind, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver(f"{_TAG}null", re.compile("^$"), [""])


class _Refused(yaml.MarkedYAMLError):
    """It is YAML, but not taken here."""


def _wrong(node: Node, problem: str) -> _Refused:
    return _Refused(problem=problem, problem_mark=node.start_mark)


def _bool(loader: _Loader, node: ScalarNode) -> bool:
    return {"true": True, "false": False}[node.value.lower()]


def _int(loader: _Loader, node: ScalarNode) -> int:
    text = node.value
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    # Python itself refuses to read thousands of digits.
    value = int(text, base) if len(text) < 100 else 2**64
    if not -(2**63) <= value < 2**63:
        raise _wrong(node, f"the number {text:.30}... has more digits than 64 bits can hold")
    return value


def _float(loader: _Loader, node: ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _str(loader: _Loader, node: ScalarNode) -> str:
    try:  # JSON writes a character beyond 16 bits as two escapes
        text = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _wrong(node, "half of a pair of surrogates is no character") from None
    if "\0" in text:
        raise _wrong(node, f"{text!r:.60} holds the character NUL; remove it")
    return text


for _kind, _construct in (("bool", _bool), ("int", _int), ("float", _float), ("str", _str)):
    _Loader.add_constructor(f"{_TAG}{_kind}", _construct)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would read as another type than text."""

    yaml_implicit_resolvers = {
        first: list(known) for first, known in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _kind, _pattern, _first in _CORE:
    _Dumper.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse(text: str) -> Any:
    """The value of a YAML or JSON text; every list and mapping in it is an object of its own.

    Raises:
        UserError: it is no such text, or holds what is refused here; the source is not named.
    """
    try:
        return _unshared(yaml.load(text, _Loader), iter(range(MAX_VALUES)))
    except yaml.MarkedYAMLError as e:
        mark, kind = e.problem_mark, "" if isinstance(e, _Refused) else "not YAML: "
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UserError(f"{kind}{' '.join(str(e.problem or e.context).split())}{where}") from None
    except yaml.YAMLError as e:
        raise UserError(f"not YAML: {' '.join(str(e).split())}") from None
    except (KeyError, ValueError) as e:  # of a value that its tag (`!!int`) does not fit
        raise UserError(f"not YAML: a value does not fit its tag ({e})") from None


def _unshared(value: Any, left: Iterator[int], depth: int = 0) -> Any:
    """Copies lists and mappings, so that none stands in two places.

    Args:
        left: gives something for every value that there may still be: aliases of aliases grow.
    """
    if depth > MAX_DEPTH:
        raise yaml.YAMLError("an alias stands for something that holds the alias")
    if next(left, None) is None:
        raise yaml.YAMLError(f"more than {MAX_VALUES:,} values, what aliases stand for counted too")
    if isinstance(value, dict):
        return {key: _unshared(part, left, depth + 1) for key, part in value.items()}
    if isinstance(value, list):
        return [_unshared(part, left, depth + 1) for part in value]
    return value


def dump(tree: dict[str, Any]) -> str:
    """A mapping as YAML that `parse`, and any reader of YAML 1.1 or 1.2, reads as the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def read_mapping(file: Path, what: str) -> dict[str, Any]:
    """The mapping that a file of YAML or JSON holds.

    Args:
        what: what the file is, for errors.

    Raises:
        UserError: it cannot be read, or is no such mapping.
    """
    name = f"{what} {str(file)!r}"
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{name} does not exist; check the path.") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{name} cannot be read: {getattr(e, 'strerror', None) or e}.") from None
    if file.suffix == ".json":
        text = text.replace("\t", " ")  # which JSON may be indented with; texts hold it as \t
    try:
        tree = parse(text)
    except UserError as e:
        raise UserError(f"{name}: {e}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{name} must hold a mapping of fields, not {tree!r:.40}.")
    return tree
