"""What `est-ds analyse` left in a run directory, for its page."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path

from est_ds.errors import UserError

FOLDER = "analysis"


def analyses(run_dir: Path) -> str:
    """Returns the figures of all measurements with what they say, as HTML; nothing without any.

    Raises:
        UserError: a file of numbers, or its figure, cannot be read.
    """
    found = [_figure(file) for file in sorted((run_dir / FOLDER).glob("*.json"))]
    return "\n".join(["<h2>Analyses</h2>", *found]) if found else ""


def _figure(file: Path) -> str:
    try:
        numbers = json.loads(file.read_text())
        title, said = escape(numbers["title"]), escape(" ".join(numbers["said"]))
        picture = file.with_suffix(".png").read_bytes()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{file} is not as est-ds analyse wrote it ({type(e).__name__}: {e}); remove it, or "
            f"run the command again."
        ) from None
    data = base64.b64encode(picture).decode("ascii")
    return (
        f'<figure><img alt="{title}" src="data:image/png;base64,{data}"/>'
        f"<figcaption>{said}</figcaption></figure>"
    )
