"""The run files that est_ds ships, found by their names."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from est_ds.errors import UserError, did_you_mean

FOLDER = "share/est_ds/configs"  # in an installation, as `setup.py` puts it there


def run_file(path: Path) -> Path:
    """The path, or where it is a bare name that nothing here has, the shipped run file so named.

    Raises:
        UserError: nothing here has that name, and no run file is shipped under it.
    """
    if path.exists():
        return path
    if path.suffix or len(path.parts) != 1 or path.name == "..":
        if path.suffix in (".yaml", ".yml") and path.stem in run_files():
            raise UserError(
                f"run file {str(path)!r} does not exist; check the path, or give the name of the "
                f"one that is shipped: {path.stem}."
            )
        return path
    shipped = run_files()
    if path.name not in shipped:
        near = did_you_mean(path.name, shipped)
        raise UserError(
            f"run file {str(path)!r} does not exist, and none is shipped under that name; {near}"
            f"give a path, or one of {', '.join(shipped)}."
        )
    return shipped[path.name]


def run_files() -> dict[str, Path]:
    """Shipped run files by name: those of the checkout, or of the installation."""
    folder = Path(__file__).parents[2] / "configs" / "run"
    files = list(folder.glob("*.yaml")) if folder.is_dir() else _installed()
    return {file.stem: file for file in sorted(files)}


def _installed() -> list[Path]:
    try:
        known = metadata.files("est_ds") or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(f.locate()) for f in known if f.match(f"{FOLDER}/run/*.yaml")]
