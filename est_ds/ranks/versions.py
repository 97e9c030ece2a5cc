"""Versions of everything whose difference would end or silently change a run."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import est_ds

PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Of est_ds, Python and `PACKAGES`; torch's with its build, such as `2.13.0+cpu`."""
    found = {"est_ds": est_ds.__version__, "python": platform.python_version()}
    return found | {name: _version(name) for name in PACKAGES}


def comparable_versions() -> dict[str, str]:
    """Versions without builds: a node without a GPU may have another build of one version."""
    return {name: found.partition("+")[0] for name, found in versions().items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
