"""What a measurement leaves behind: numbers and a figure in a folder, and what it says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from est_ds.disk import replace_bytes, replace_text, try_to_write
from est_ds.errors import Failure, UserError
from est_ds.report.analyses import FOLDER
from est_ds.report.style import styled


@dataclass(frozen=True)
class Result:
    """A measurement.

    Attributes:
        name: of its files.
        title: of the figure.
        numbers: what the file of numbers holds, besides `title` and `said`.
        said: the result in sentences, also below the figure in the report.
    """

    name: str
    title: str
    numbers: dict[str, Any]
    said: tuple[str, ...]
    figure: Figure

    @property
    def json(self) -> str:
        """The file of numbers.

        Raises:
            Failure: one of them is none.
        """
        tree = {"title": self.title, "said": list(self.said), **self.numbers}
        try:
            return json.dumps(tree, indent=1, allow_nan=False)
        except ValueError:
            raise Failure(
                f"{self.name}: a value is not finite, as where the model's loss is not; nothing "
                f"was written. Choose an earlier checkpoint (--step)."
            ) from None

    def write(self, folder: Path) -> list[Path]:
        """Writes `NAME.png`, then `NAME.json`, each whole or not at all.

        Raises:
            UserError: the folder cannot be written.
        """
        numbers = self.json
        files = [folder / f"{self.name}.png", folder / f"{self.name}.json"]
        picture = BytesIO()
        with styled():
            self.figure.savefig(picture, format="png", dpi=150)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_bytes(files[0], picture.getvalue())
            replace_text(files[1], numbers + "\n")
        except OSError as e:
            raise _unwritable(folder, e) from None
        return files


def check_folder(folder: Path) -> None:
    """Checks, before anything is measured, whether results can be written.

    Raises:
        UserError: they cannot.
    """
    try:
        try_to_write(folder)
    except OSError as e:
        raise _unwritable(folder, e) from None


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{str(folder)!r} cannot be written ({error.strerror or error}); it must be a folder: mend "
        f"that, or of a toy give another one (--out)."
    )


def of_run(directory: Path) -> Path:
    """The folder of a run's measurements."""
    return directory / FOLDER
