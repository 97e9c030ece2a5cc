"""Strict, frozen settings, and one clear error for the first thing that is wrong with them."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
)

from est_ds.errors import UserError, did_you_mean


class Strict(BaseModel):
    """Settings that refuse unknown keys and cannot change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )


# Parts of a location that no run file has.
UNION_TAGS = ("cosine", "wsd", "int", "float", "constrained-", "<")


M = TypeVar("M", bound=Strict)


def checked(kind: type[M], section: dict[str, Any], where: str = "") -> M:
    """`section` as `kind`.

    Raises:
        UserError: the first thing wrong with it, by its dotted name.
    """
    try:
        return kind.model_validate(section)
    except ValidationError as e:
        raise UserError(_describe(kind, e.errors()[0], where)) from None


def _describe(kind: type[BaseModel], error: dict[str, Any], where: str) -> str:
    location = [str(part) for part in error["loc"] if not str(part).startswith(UNION_TAGS)]
    field = ".".join(([where] if where else []) + location)
    if error["type"] == "extra_forbidden":
        known = _keys_beside(kind, error["loc"])
        hint = did_you_mean(location[-1], known)
        return f"unknown key {field!r}; {hint}Known here: {', '.join(known)}."
    if error["type"] == "missing":
        return f"{field} is missing; add it to the run file."
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], (dict, list)):
        return f"{field}: {message}."
    return f"{field}={error['input']!r}: {message[0].lower()}{message[1:]}."


def _keys_beside(kind: Any, location: tuple) -> list[str]:
    """The keys that the model at `location` (less its last part) knows."""
    models = [kind]
    for part in location[:-1]:
        found = []
        for model in models:
            if part in ("cosine", "wsd") and model.model_fields["name"].annotation == Literal[part]:
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
