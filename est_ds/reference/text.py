"""The table of fields for a terminal, as JSON, and as `configs/FIELDS.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill

from est_ds.disk import replace_text
from est_ds.errors import UserError
from est_ds.reference.schema import Schemas
from est_ds.reference.table import Row, Section, sections

PAGE, RUN_SCHEMA, STUDY_SCHEMA = "FIELDS.md", "run.schema.json", "study.schema.json"
WIDTH = 80
HEAD = f"""# All fields

`est-ds fields --write configs` writes this page from the code. `est-ds fields SECTION` prints a
part of it, and with `--json` for programs. A name is written as an override on the command line
writes it (`optimizer.lr=3.0e-4`); `[]` stands for a position (`method.phases.0.until=0.5`). A
fraction of the run has a point (`0.5`, `1.0`), a number of steps has none. The files of sections
(`model`, `method`, `data`) hold what stands below the section's name here.

Editors that know the language server of YAML check a file and show what its fields mean if a line
of it names the schema, by a path relative to the file:

```
# yaml-language-server: $schema=../{RUN_SCHEMA}
```

[{RUN_SCHEMA}]({RUN_SCHEMA}) is for run files, [{STUDY_SCHEMA}]({STUDY_SCHEMA}) for
study files. A schema sees one field at a time: `est-ds plan` checks that they fit together.
"""


def as_text(found: Sequence[Section]) -> str:
    """Sections for a terminal."""
    lines = []
    for section in found:
        lines += [fill(f"{section.name}: {section.about}", WIDTH), ""]
        for row in section.rows:
            lines.append(fill(f"{row.field}: {_plain(row)}", WIDTH, **_indented(2)))
            lines.append(fill(row.meaning, WIDTH, **_indented(6)))
        lines.append("")
    return "\n".join(lines).rstrip()


def as_json(found: Sequence[Section]) -> str:
    """Sections for programs."""
    return json.dumps([asdict(section) for section in found], indent=2)


def as_page(found: Sequence[Section]) -> str:
    """Sections in Markdown."""
    parts = [HEAD]
    for section in found:
        heading = section.name.replace(".", ": ")
        parts.append(f"## {heading}\n\n{fill(section.about, 100)}\n")
        rows = [
            f"| `{row.field}` | {row.type} | {_default(row)} | {_cell(row.meaning)} |"
            for row in section.rows
        ]
        head = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([*head, *rows]) + "\n")
    return "\n".join(parts)


def files(schemas: Schemas) -> dict[str, str]:
    """Texts of the page and of the schemas by the names of their files."""
    return {
        PAGE: as_page(sections(schemas)),
        RUN_SCHEMA: json.dumps(schemas.run_file, indent=1) + "\n",
        STUDY_SCHEMA: json.dumps(schemas.study_file, indent=1) + "\n",
    }


def write_files(schemas: Schemas, folder: Path) -> list[Path]:
    """Writes page and schemas into a folder; returns the files.

    Raises:
        UserError: they cannot be written.
    """
    texts = files(schemas)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            replace_text(folder / name, text)
    except OSError as e:
        raise UserError(
            f"--write={str(folder)!r} cannot be written: {e.strerror or e}; give a folder that you "
            f"may write to."
        ) from None
    return [folder / name for name in texts]


def _plain(row: Row) -> str:
    default = _default(row) if row.required else f"default {_default(row)}"
    return f"{row.type}; {default}".replace("`", "")


def _default(row: Row) -> str:
    if row.required:
        return "required"
    return "none" if row.default is None else f"`{json.dumps(row.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _indented(by: int) -> dict[str, str]:
    return {"initial_indent": " " * by, "subsequent_indent": " " * (by + 2)}
