"""What the fields of settings mean: the `Attributes` of their models' docstrings, and nothing else.

The JSON schema of a model says the rest: names, types, bounds and defaults.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

_HEADING = "Attributes:"
_ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): (.*)")


def about(kind: type) -> str:
    """What a docstring says before its attributes, on one line."""
    return " ".join(_docstring(kind).partition(_HEADING)[0].split())


def meanings(kind: type[BaseModel]) -> dict[str, str]:
    """What the docstring of a model, and of those that it extends, says of attributes, by name."""
    found: dict[str, str] = {}
    own = kind.__mro__[: kind.__mro__.index(BaseModel)]  # which explains attributes of its own
    for part in reversed(own):
        names: list[str] = []
        for line in _docstring(part).partition(_HEADING)[2].splitlines():
            if entry := _ENTRY.fullmatch(line):
                names = entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2])
            elif line.startswith(" "):  # goes on
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def described(*kinds: type[BaseModel]) -> tuple[list[str], dict[str, Any]]:
    """JSON schemas of models, with meanings: the name of each, and by name theirs and those of all
    models in them.

    A field without a meaning has an empty `description`.
    """
    pairs: Any = [(kind, "validation") for kind in kinds]
    references, schemas = models_json_schema(pairs, schema_generator=_WithMeanings)
    names = [references[pair]["$ref"].rpartition("/")[2] for pair in pairs]
    return names, schemas["$defs"]


class _WithMeanings(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # it would repeat the name

    def model_schema(self, schema: Any) -> Any:
        kind, found = schema["cls"], super().model_schema(schema)
        known = meanings(kind)
        for name, field in found["properties"].items():
            chooses = name == "name" and "const" in field
            field["description"] = known.get(name, about(kind) if chooses else "")
        del found["title"]
        return found | {"description": about(kind)}


def _docstring(kind: type) -> str:
    """A class's own docstring, none that it inherits."""
    return inspect.cleandoc(vars(kind).get("__doc__") or "")
