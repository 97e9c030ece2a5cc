"""The frame of a page: one HTML file that needs no network and prints well."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from est_ds.disk import replace_text
from est_ds.errors import UserError

STYLE = """:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d232b; background: #fff;
  max-width: 54rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #d8dde3; }
.lead { color: #5b6672; margin: .2rem 0 1.6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .9rem .28rem 0; text-align: left; vertical-align: top; }
.phases { width: 100%; }
.phases th, .phases td { text-align: right; border-bottom: 1px solid #e6e9ed; }
.phases th:first-child, .phases td:first-child { text-align: left; }
.phases th { vertical-align: bottom; font-weight: 600; }
.facts th { font-weight: 400; color: #5b6672; white-space: nowrap; }
figure { margin: 1.6rem 0 0; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
figcaption, .note { color: #5b6672; font-size: .86rem; }
pre { background: #f5f7f9; padding: .9rem 1.1rem; font-size: .8rem; line-height: 1.4;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { body { font-size: 10pt; margin: 0; max-width: none; } h2 { break-after: avoid; } }"""

FRAME = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>$title</title>
<style>
$style
</style>
$head</head>
<body>
$body
</body>
</html>
""")


def framed(title: str, body: str, style: str = STYLE, head: str = "") -> str:
    """Returns a whole page.

    Args:
        title: as plain text.
        body: as HTML.
        head: what stands in the head besides the style, as HTML.
    """
    return FRAME.substitute(title=escape(title), style=style, head=head, body=body)


def row(cells: Sequence[str], first: str, rest: str) -> str:
    """Returns a row of a table, of plain texts.

    Args:
        first, rest: tags of the first cell and of the others.
    """
    tags = [first] + [rest] * (len(cells) - 1)
    return f"<tr>{''.join(f'<{t}>{escape(cell)}</{t}>' for t, cell in zip(tags, cells))}</tr>\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns what stands within a table: its heads, and its rows."""
    body = "".join(row(cells, "td", "td") for cells in rows)
    return f"<thead>{row(heads, 'th', 'th')}</thead><tbody>{body}</tbody>"


def write_whole(file: Path, page: str, remedy: str) -> None:
    """Writes a page whole or not at all.

    Raises:
        UserError: it cannot be written; `remedy` says what to do.
    """
    try:
        replace_text(file, page)
    except OSError as e:
        raise UserError(
            f"report {str(file)!r} cannot be written: {e.strerror or e}; {remedy}."
        ) from None
