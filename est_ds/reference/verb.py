"""`est-ds fields`: what may be asked, and what is called. Loads no library until then."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_fields(fields: argparse.ArgumentParser) -> None:
    """Adds the options of `est-ds fields`."""
    fields.description = (
        "Prints name, type, default and meaning of the fields of run files and study files."
    )
    fields.set_defaults(verb=_fields, parser=fields)
    fields.add_argument(
        "section",
        nargs="?",
        metavar="SECTION",
        help="a section (optimizer, method, method.est, study) or a field (default: all)",
    )
    form = fields.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON and nothing else")
    form.add_argument(
        "--write",
        type=Path,
        metavar="FOLDER",
        help="write the page FIELDS.md and the JSON schemas for editors there",
    )


def _fields(parsed: argparse.Namespace, arguments: list[str]) -> None:
    """Runs `est-ds fields`."""
    from est_ds.errors import UserError
    from est_ds.reference.schema import read_schemas
    from est_ds.reference.table import chosen, sections
    from est_ds.reference.text import as_json, as_text, write_files

    schemas = read_schemas()
    if parsed.write is None:
        found = chosen(sections(schemas), parsed.section)
        print(as_json(found) if parsed.json else as_text(found))
        return
    if parsed.section is not None:
        raise UserError(
            f"SECTION {parsed.section!r} has no effect with --write, which writes all of them; "
            f"remove one of the two."
        )
    for file in write_files(schemas, parsed.write):
        print(f"wrote {file}")
