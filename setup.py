"""Packages est_ds and data_prep; the versions of all dependencies: launch/requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
PINS = "launch/requirements.txt"


def read_pins():
    """Returns (requirements, extras); a line marked `extra == "name"` goes to that extra."""
    requirements, extras = [], {}
    for line in (ROOT / PINS).read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        optional = re.fullmatch(r'(\S+)\s*;\s*extra == "([\w-]+)"', line)
        if optional:
            extras.setdefault(optional[2], []).append(optional[1])
        else:
            requirements.append(line)
    return requirements, extras


def read_version():
    source = (ROOT / "est_ds" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]


def read_description():
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


def list_presets():
    """Run files and their sections as data files, in the folders that they name each other by."""
    found = []
    for part in ("data", "method", "mixture", "model", "run"):
        files = sorted(f"configs/{part}/{f.name}" for f in (ROOT / "configs" / part).glob("*.yaml"))
        found.append((f"share/est_ds/configs/{part}", files))
    return found


requirements, extras = read_pins()

setup(
    name="est_ds",
    version=read_version(),
    description="Evolving-subnetwork pretraining of language models on DeepSpeed",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["est_ds", "est_ds.*", "data_prep", "data_prep.*"]),
    # Listed here so that a source distribution carries it: setup.py cannot run without it.
    data_files=[("share/est_ds", [PINS]), *list_presets()],
    install_requires=requirements,
    extras_require=extras,
    entry_points={"console_scripts": ["est-ds = est_ds.cli:main"]},
)
