"""`est-ds fields`: every field has a meaning, and page and schemas are those of the code."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import jsonschema
import pytest
import yaml
from pydantic import Field

import data_prep.config  # noqa: F401  its settings have meanings too
import est_ds.run.parent  # noqa: F401
from conftest import ROOT, refused
from est_ds.cli import main
from est_ds.config.meanings import about, described, meanings
from est_ds.config.strict import Strict
from est_ds.reference.schema import VARIANTS, read_schemas
from est_ds.reference.table import Row, chosen, sections
from est_ds.reference.text import as_json, as_text, files

SCHEMAS = read_schemas()
SECTIONS = sections(SCHEMAS)
VALIDATORS = {
    "run": jsonschema.Draft202012Validator(SCHEMAS.run_file),
    "study": jsonschema.Draft202012Validator(SCHEMAS.study_file),
}
CONFIGS = ROOT / "configs"
STUDY_RUNS = ("llama_0m7.yaml",)  # run files that stand among the studies
RUN_FILES = [*(CONFIGS / "run").glob("*.yaml"), *(CONFIGS / "study" / n for n in STUDY_RUNS)]
STUDY_FILES = [f for f in (CONFIGS / "study").glob("*.yaml") if f.name not in STUDY_RUNS]


def settings(kind: type = Strict) -> list[type[Strict]]:
    """All models of settings of this project."""
    below = [model for part in kind.__subclasses__() for model in settings(part)]
    return [kind, *below] if kind.__module__.startswith(("est_ds.", "data_prep.")) else below


@pytest.mark.parametrize(
    "kind", [k for k in settings() if k is not Strict], ids=lambda k: k.__name__
)
def test_every_field_has_a_meaning_and_every_meaning_a_field(kind):
    names = {info.alias or name: info for name, info in kind.model_fields.items()}
    without = [
        name
        for name, info in names.items()
        if name not in meanings(kind) and not (name == "name" and "Literal" in str(info.annotation))
    ]
    assert not without, f"add them to Attributes of {kind.__name__}'s docstring"
    assert not [
        name for name in meanings(kind) if name not in names and name not in kind.__class_vars__
    ]


class Small(Strict):
    """What it is,
    on two lines.

    More of it.

    Attributes:
        old: replaced below.
        first, second: of two: `a` is one,
            and goes on.
    """

    old: int
    first: Annotated[float, Field(gt=0.0)] = 0.5
    second: Literal["a", "b"] = "a"


class Larger(Small):
    """It adds.

    Attributes:
        old: the new one.
        wide: as `global_`.
    """

    wide_: list[Small] | None = Field(None, alias="wide")


def test_meanings_are_the_attributes_of_a_docstring_and_of_those_below():
    assert about(Small) == "What it is, on two lines. More of it."
    assert about(Larger) == "It adds."
    assert meanings(Larger) == {
        "old": "the new one.",
        "first": "of two: `a` is one, and goes on.",
        "second": "of two: `a` is one, and goes on.",
        "wide": "as `global_`.",
    }
    [name], definitions = described(Larger)
    assert definitions[name]["properties"]["first"] == {
        "type": "number",
        "exclusiveMinimum": 0.0,
        "default": 0.5,
        "description": "of two: `a` is one, and goes on.",
    }
    assert definitions["Small"]["properties"]["old"]["description"] == "replaced below."


@pytest.mark.parametrize("name", files(SCHEMAS))
def test_page_and_schemas_are_those_of_the_code(name):
    said = f"run est-ds fields --write configs, and commit configs/{name}"
    assert (CONFIGS / name).read_text() == files(SCHEMAS)[name], said


def test_rows_say_name_type_default_and_meaning():
    rows = {row.field: row for section in chosen(SECTIONS, "optimizer") for row in section.rows}
    assert list(rows) == [
        f"optimizer.{name}"
        for name in ("lr", "betas", "eps", "weight_decay", "decay", "clip", "inactive")
    ]
    lr = Row("optimizer.lr", "number above 0", True, None, "learning rate at its peak.")
    assert rows["optimizer.lr"] == lr
    betas = rows["optimizer.betas"]
    assert betas.type == "list of 2, each: number at least 0 and below 1"
    assert betas.default == [0.9, 0.95] and not betas.required
    assert rows["optimizer.inactive"].type == "`zero_grad`, `freeze`"
    by_name = {row.field: row for section in SECTIONS for row in section.rows}
    assert by_name["data.train"].type == "text or list, each: section"
    assert by_name["data.train[].weight"].type == "number above 0"
    assert by_name["method.balance_groups"].default is None
    assert by_name["start.reading.samples"].required
    assert by_name["seed"].type == "whole number at least 0 and below 2**63"
    [pld] = chosen(SECTIONS, "method.pld")
    assert {row.field: row.default for row in pld.rows}["method.scale"] == {"layers": "inverse"}


def test_every_name_is_a_section():
    names = [section.name for section in SECTIONS]
    assert len(set(names)) == len(names)
    for section, known in VARIANTS.items():
        found = [name for name in names if name.startswith(f"{section}.")]
        assert found == [f"{section}.{name}" for name in known]
        assert [s.name for s in chosen(SECTIONS, section)] == found
    fields = {row.field for section in SECTIONS[:1] for row in section.rows}
    assert {name.partition(".")[0] for name in names} <= fields | {"run", "study"}


def test_the_verb_prints_text_json_and_files(capsys, tmp_path):
    main(["fields", "method.est"])
    said = capsys.readouterr().out
    assert said == as_text(chosen(SECTIONS, "method.est")) + "\n"
    assert "  method.phases[].until: whole number or number; required\n" in said
    assert max(map(len, said.splitlines())) <= 80
    main(["fields", "batch.micro", "--json"])
    found = capsys.readouterr().out
    assert found == as_json(chosen(SECTIONS, "batch.micro")) + "\n"
    [section] = json.loads(found)
    assert [row["field"] for row in section["rows"]] == ["batch.micro"]
    main(["fields", "--write", str(tmp_path / "new")])
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == sorted(files(SCHEMAS))


def test_a_section_that_is_none_is_refused(capsys):
    assert "did you mean 'optimizer'? Sections are run, " in refused(capsys, "fields", "optimiser")
    assert "has no effect with --write" in refused(capsys, "fields", "data", "--write", "nowhere")


def test_a_place_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        error = refused(capsys, "fields", "--write", folder)
        assert f"--write={str(folder)!r} cannot be written: " in error
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    "file", [*RUN_FILES, *STUDY_FILES], ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_files_fit_the_schema_that_they_name(file):
    text = file.read_text()
    kind = "run" if file in RUN_FILES else "study"
    line = f"# yaml-language-server: $schema=../{kind}.schema.json"
    assert line in text.splitlines(), f"add {line}"
    tree = yaml.safe_load(text)
    VALIDATORS[kind].validate(tree)
    for section in ("method", "model"):
        if isinstance(tree.get(section), str):
            tree[section] = yaml.safe_load((file.parent / tree[section]).read_text())
    VALIDATORS[kind].validate(tree)


@pytest.mark.parametrize("kind", VALIDATORS)
def test_a_schema_is_one(kind):
    jsonschema.Draft202012Validator.check_schema(VALIDATORS[kind].schema)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("method", {"name": "pld", "gama": 1.0}),
        ("method", {"name": "est", "phases": []}),
        ("method", {"theta_bar": 0.5}),
        ("objective", {"rate": 0.15}),
        ("schedule", {"name": "linear", "decay": 0.1}),
        ("model", {"model_type": "gptj"}),
        ("batch", {"global": 8, "micro": 0}),
        ("batch", {"global": 8, "micro": 4, "macro": 4}),
        ("optimizer", {"lr": "high"}),
        ("stepz", 3),
    ],
)
def test_the_schema_refuses_what_a_run_refuses(section, value):
    run = yaml.safe_load((CONFIGS / "run" / "quickstart.yaml").read_text())
    assert VALIDATORS["run"].is_valid(run)
    assert not VALIDATORS["run"].is_valid(run | {section: value})


def test_every_method_preset_fits_the_schema():
    run = yaml.safe_load((CONFIGS / "run" / "quickstart.yaml").read_text())
    for file in sorted((CONFIGS / "method").glob("*.yaml")):
        VALIDATORS["run"].validate(run | {"method": yaml.safe_load(file.read_text())})
