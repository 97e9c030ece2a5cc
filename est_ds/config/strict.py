"""Strict, frozen settings, and one clear error for the first thing that is wrong with them."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
)
from pydantic_core import ErrorDetails

from est_ds.errors import UserError, did_you_mean


def _with_strict_scalars(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_strict_scalars(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {"strict": True} if schema.get("type") in ("int", "float", "bool") else {}
    return {key: _with_strict_scalars(part) for key, part in schema.items()} | strict


class Strict(BaseModel):
    """Settings that refuse unknown keys and values of another type, and cannot change.

    A whole number passes where any number does; text, true and false are no numbers anywhere.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        # Not ConfigDict(strict=True), which would take no list for a tuple and no mapping for a
        # section.
        return _with_strict_scalars(handler(source))


class Stored(BaseModel):
    """A part of a file of this project's own; unknown keys are refused: another version wrote
    them."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SCHEDULES = ("cosine", "linear", "inverse_sqrt", "wsd")
# Parts of a location that no run file has.
UNION_TAGS = (*SCHEDULES, "int", "float", "constrained-", "<")


# After pydantic's own words, which say what a value is not.
HINTS = {
    "int_type": "; write a whole number, without quotes or a point",
    "float_type": "; write a number, without quotes",
    "bool_type": "; write true or false",
    "string_type": "; put it in quotes",
}
# In place of pydantic's own words, which are Python's.
WORDS = {
    **dict.fromkeys(("tuple_type", "list_type"), "write a list, [VALUE, ...]"),
    **dict.fromkeys(
        ("model_type", "dict_type", "model_attributes_type"), "write a section, {KEY: VALUE, ...}"
    ),
}
M = TypeVar("M", bound=Strict)


def checked(kind: type[M], section: dict[str, Any], where: str = "") -> M:
    """`section` as `kind`.

    Raises:
        UserError: the first thing wrong with it, by its dotted name.
    """
    try:
        return kind.model_validate(section)
    except ValidationError as e:
        raise UserError(_describe(kind, _nearest(e.errors()), where)) from None


def _nearest(errors: list[ErrorDetails]) -> ErrorDetails:
    """The first error; where the field may be of more types, of the one that takes most."""
    found, *others = errors
    for error in others:
        same = error["loc"][:-1] == found["loc"][:-1] and error["input"] == found["input"]
        if found["type"] == "int_type" and same and str(error["loc"][-1]).startswith(UNION_TAGS):
            found = error
    return found


def _describe(kind: type[BaseModel], error: ErrorDetails, where: str) -> str:
    location = [str(part) for part in error["loc"] if not str(part).startswith(UNION_TAGS)]
    field = ".".join(([where] if where else []) + location)
    if error["type"] == "extra_forbidden":
        known = _keys_beside(kind, error["loc"])
        hint = did_you_mean(location[-1], known)
        return f"unknown key {field!r}; {hint}Known here: {', '.join(known)}."
    if error["type"] == "missing":
        return f"{field} is missing; add it to the run file."
    if error["type"] == "union_tag_not_found":
        models = _models_in(kind.model_fields[location[-1]].annotation)
        names = ", ".join(get_args(model.model_fields["name"].annotation)[0] for model in models)
        keys = ", ".join(map(repr, error["input"])) or "none"
        return f"{field}.name is missing (its keys: {keys}); give `name: X`, X one of {names}."
    message = WORDS.get(error["type"], error["msg"].removeprefix("Value error, "))
    if isinstance(error["input"], (dict, list)):
        return f"{field}: {message}." if field else f"{message}."
    hint = HINTS.get(error["type"], "")
    return f"{field}={error['input']!r}: {message[0].lower()}{message[1:]}{hint}."


def _keys_beside(kind: Any, location: tuple) -> list[str]:
    """The keys that the model at `location` (less its last part) knows."""
    models = [kind]
    for part in location[:-1]:
        found = []
        for model in models:
            if part in SCHEDULES and model.model_fields["name"].annotation == Literal[part]:
                found.append(model)
            for name, info in model.model_fields.items():
                if part in (name, info.alias):
                    found += _models_in(info.annotation)
        models = found or models
    return [info.alias or name for model in models for name, info in model.model_fields.items()]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inner = getattr(annotation, "__args__", ())
    return [model for part in inner for model in _models_in(part)]
