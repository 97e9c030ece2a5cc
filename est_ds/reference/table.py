"""The fields of run files and study files, in rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from est_ds.config.meanings import about
from est_ds.config.run_config import RunConfig
from est_ds.errors import UserError, did_you_mean
from est_ds.reference.schema import Schemas, section_about
from est_ds.studies.study_file import Study


@dataclass(frozen=True)
class Row:
    """A field.

    Attributes:
        field: its dotted name, as overrides and errors write it; `[]` stands for a position.
        type: in words.
        required: whether it has no default.
        default: as JSON has it.
        meaning: what it says.
    """

    field: str
    type: str
    required: bool
    default: Any
    meaning: str


@dataclass(frozen=True)
class Section:
    """A section of a file.

    Attributes:
        name: `run` and `study`: a whole file, whose sections are single rows; else the section's,
            with the `name` in it: `method.est`.
        about: what it is.
    """

    name: str
    about: str
    rows: tuple[Row, ...]


def sections(schemas: Schemas) -> tuple[Section, ...]:
    """All sections: a run's in the order of its fields, then a study's."""
    run = schemas.run
    found = [Section("run", about(RunConfig), tuple(_rows(schemas, run, "", deep=False)))]
    for section, field in run["properties"].items():
        if section in schemas.variants:
            for name, schema in schemas.variants[section].items():
                rows = tuple(_rows(schemas, schema, f"{section}."))
                found.append(Section(f"{section}.{name}", section_about(section, name), rows))
            continue
        inner = [schemas.resolved(option) for option in _options(field)]
        for schema in inner:
            if "properties" in schema:
                meaning = schema.get("description") or field["description"]
                rows = tuple(_rows(schemas, schema, f"{section}."))
                found.append(Section(section, meaning, rows))
    rows = tuple(_rows(schemas, schemas.study, ""))
    return *found, Section("study", about(Study), rows)


def chosen(known: tuple[Section, ...], asked: str | None) -> tuple[Section, ...]:
    """The sections that are asked for: `method`, `method.est`, or a field, such as `optimizer.lr`.

    Raises:
        UserError: there is none of that name.
    """
    if asked is None:
        return known
    found = tuple(s for s in known if s.name == asked or s.name.startswith(f"{asked}."))
    if found:
        return found
    for section in known:
        rows = tuple(
            row
            for row in section.rows
            if row.field == asked or row.field.startswith((f"{asked}.", f"{asked}["))
        )
        if rows:
            found += (Section(section.name, section.about, rows),)
    if not found:
        names = dict.fromkeys(section.name.partition(".")[0] for section in known)
        near = [*names, *(s.name for s in known), *(row.field for s in known for row in s.rows)]
        raise UserError(
            f"SECTION {asked!r}: there is no such section or field; {did_you_mean(asked, near)}"
            f"Sections are {', '.join(names)}."
        )
    return found


def _rows(
    schemas: Schemas, schema: dict[str, Any], prefix: str, *, deep: bool = True
) -> Iterator[Row]:
    """A row for every field, and below it those of the models that it holds."""
    for name, field in sorted(schema["properties"].items(), key=lambda item: item[0] != "name"):
        default = _short_default(schemas, field)
        required = name in schema.get("required", ())
        yield Row(
            f"{prefix}{name}", type_text(schemas, field), required, default, field["description"]
        )
        for path, inner in _inner(schemas, field) if deep else ():
            yield from _rows(schemas, inner, f"{prefix}{name}{path}.")


def _inner(schemas: Schemas, field: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Models that a field holds, each with what leads to it."""
    for option in _options(field):
        schema = schemas.resolved(option)
        if "properties" in schema:
            yield "", schema
        elif "properties" in (items := schemas.resolved(schema.get("items", {}))):
            yield "[]", items


def _options(field: dict[str, Any]) -> list[dict[str, Any]]:
    return field.get("anyOf") or field.get("oneOf") or [field]


def _short_default(schemas: Schemas, field: dict[str, Any]) -> Any:
    """The default, of a section what differs from the defaults in it."""
    default, model = field.get("default"), schemas.resolved(field)
    if not isinstance(default, dict) or "properties" not in model:
        return default
    inner = {name: part.get("default") for name, part in model["properties"].items()}
    return {name: value for name, value in default.items() if value != inner[name]}


def type_text(schemas: Schemas, field: dict[str, Any]) -> str:
    """The type of a field in words; that it may be left empty is not said, its default says it."""
    options = [option for option in _options(field) if option.get("type") != "null"]
    return " or ".join(dict.fromkeys(_one_type(schemas, option) for option in options))


def _one_type(schemas: Schemas, schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        values = schema.get("enum") or [schema["const"]]
        return ", ".join(f"`{value}`" for value in values)
    if "$ref" in schema or "properties" in schema:
        return "section"
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items") or schema.get("prefixItems", [{}])[0]
        exact = schema.get("minItems") == schema.get("maxItems") and schema.get("minItems")
        inner = type_text(schemas, items) if items else "any value"
        return f"list{f' of {exact}' if exact else ''}, each: {inner}"
    if kind == "object":
        inner = schema.get("additionalProperties") or {}
        for of_names in schema.get("patternProperties", {}).values():
            inner = of_names
        values = type_text(schemas, inner) if isinstance(inner, dict) and inner else "any value"
        return f"mapping, each: {values}"
    names = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`"}
    return names.get(str(kind), "text" if kind == "string" else "any value") + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']:g} to {schema['maximum']:g}"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    bounds = [f"{word} {_short(schema[key])}" for key, word in words.items() if key in schema]
    return f" {' and '.join(bounds)}" if bounds else ""


def _short(bound: float) -> str:
    return f"{bound:g}" if bound < 2**31 else f"2**{math.log2(bound):g}"
