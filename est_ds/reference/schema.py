"""JSON schemas of run files and study files, for editors and for the table of fields."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, get_args

from est_ds.config.meanings import about, described
from est_ds.config.published import FROM, SHA256
from est_ds.config.run_config import RunConfig
from est_ds.config.run_file import SECTIONS
from est_ds.config.strict import Strict
from est_ds.data.objectives import OBJECTIVES
from est_ds.plans.methods import METHODS
from est_ds.slicing.families import FAMILIES
from est_ds.slicing.families.fields import Init
from est_ds.studies.study_file import Study

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# Sections of a run of which there is one kind for every `name`.
VARIANTS: dict[str, dict[str, type[Strict]]] = {
    "method": {name: method.Settings for name, method in METHODS.items()},
    "objective": dict(OBJECTIVES),
    "schedule": {
        get_args(kind.model_fields["name"].annotation)[0]: kind
        for kind in get_args(RunConfig.model_fields["schedule"].annotation)
    },
}


@dataclass(frozen=True)
class Schemas:
    """The schemas of all sections.

    Attributes:
        run: of a run file, with no `$defs`.
        study: of a study file.
        variants: by section, such as `method`, and by the `name` in it.
        definitions: of everything that the others refer to.
    """

    run: dict[str, Any]
    study: dict[str, Any]
    variants: dict[str, dict[str, dict[str, Any]]]
    definitions: dict[str, dict[str, Any]]

    @property
    def run_file(self) -> dict[str, Any]:
        """The schema of a run file, whole."""
        return self._whole(self.run, "A run of est_ds")

    @property
    def study_file(self) -> dict[str, Any]:
        """The schema of a study file, whole."""
        return self._whole(self.study, "A study of est_ds")

    def resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        """What a schema refers to; itself, if it refers to nothing."""
        name = schema.get("$ref", "").rpartition("/")[2]
        return self.definitions[name] if name else schema

    def _whole(self, schema: dict[str, Any], title: str) -> dict[str, Any]:
        needed: set[str] = set()
        _collect(schema, self.definitions, needed)
        definitions = {name: self.definitions[name] for name in sorted(needed)}
        return {"$schema": DIALECT, "title": title, **schema, "$defs": definitions}


def read_schemas() -> Schemas:
    """Makes the schemas from the models."""
    kinds = [kind for known in VARIANTS.values() for kind in known.values()]
    (of_run, of_study, of_init, *names), definitions = described(RunConfig, Study, Init, *kinds)
    name_of = dict(zip(kinds, names))
    for name in names:  # the name chooses the section, so that it always stands there
        schema = definitions[name]
        schema["required"] = list(dict.fromkeys(["name", *schema.get("required", ())]))
        schema["properties"]["name"].pop("default", None)
    run, study = definitions.pop(of_run), definitions.pop(of_study)
    fields = run["properties"]
    for section, known in VARIANTS.items():
        kept = {k: v for k, v in fields[section].items() if k in ("description", "default")}
        fields[section] = {"anyOf": [_reference(name_of[kind]) for kind in known.values()], **kept}
    fields["model"] = _model(_reference(of_init), fields["model"]["description"])
    for section in SECTIONS:
        fields[section] = _or_a_file(fields[section])
    variants = {
        section: {name: definitions[name_of[kind]] for name, kind in known.items()}
        for section, known in VARIANTS.items()
    }
    return Schemas(run, study, variants, definitions)


def section_about(section: str, name: str) -> str:
    """What a method, an objective or a schedule is, in a sentence."""
    kind = VARIANTS[section][name]
    if section == "schedule":
        return about(kind)
    first = (sys.modules[kind.__module__].__doc__ or "").partition("\n\n")[0]
    return " ".join(first.removeprefix(f"`{name}`: ").split())


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def _model(init: dict[str, Any], description: str) -> dict[str, Any]:
    """The `model` section: its other keys are Hugging Face's."""
    known = [model_type for family in FAMILIES for model_type in family.model_types]
    return {
        "type": "object",
        "description": description,
        "properties": {
            "model_type": {
                "enum": known,
                "description": "the family, as Hugging Face names it; the other keys are those of "
                "its config.",
            },
            "init": {**init, "description": "how wide the first weights are drawn."},
            FROM: {
                "type": "string",
                "description": "a Hugging Face folder whose weights the run begins with, and whose "
                "config it has; then model_type is its own.",
            },
            SHA256: {
                "type": "string",
                "description": "hash of its weight files; the resolved config says it.",
            },
        },
    }


def _or_a_file(field: dict[str, Any]) -> dict[str, Any]:
    """A section, or the path of the file that holds it."""
    inner = {k: v for k, v in field.items() if k != "description"}
    options = inner.get("anyOf", [inner])
    file = {"type": "string", "minLength": 1}
    return {"anyOf": [*options, file], "description": field["description"]}


def _collect(value: Any, definitions: dict[str, Any], needed: set[str]) -> None:
    """Adds the names of all definitions that a schema refers to."""
    if isinstance(value, list):
        for part in value:
            _collect(part, definitions, needed)
    elif isinstance(value, dict):
        name = str(value.get("$ref", "")).rpartition("/")[2]
        if name and name not in needed:
            needed.add(name)
            _collect(definitions[name], definitions, needed)
        for part in value.values():
            _collect(part, definitions, needed)
