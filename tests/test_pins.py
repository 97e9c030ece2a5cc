"""Versions stand in one file, and the package is made from it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from cases.pins import applies_here, read_pins

ROOT = Path(__file__).resolve().parents[1]


def test_every_pin_is_exact_and_one_applies_to_each_package():
    pins = read_pins()
    for pin in pins:
        assert re.fullmatch(r"==[0-9.]+", str(pin.specifier)), pin
    for python in "3.10", "3.11", "3.12", "3.13":
        for name in {pin.name for pin in pins}:
            matches = [
                pin
                for pin in pins
                if pin.name == name
                and (
                    pin.marker is None
                    or "extra" in str(pin.marker)
                    or pin.marker.evaluate({"python_version": python, "extra": ""})
                )
            ]
            assert len(matches) == 1, (python, name, matches)


@pytest.mark.parametrize("pin", [p for p in read_pins() if applies_here(p, "test")], ids=str)
def test_installed_version_is_the_pinned_one(pin):
    (specifier,) = pin.specifier
    assert Version(metadata.version(pin.name)).public == specifier.version


def test_no_other_file_holds_a_version():
    for name in "setup.py", "docker/Dockerfile", "launch/env.sh", "launch/quickstart.sh":
        assert not re.search(r"==\d", (ROOT / name).read_text()), name


def test_setup_reads_the_pins_and_a_source_distribution_carries_them(tmp_path):
    source = tmp_path / "a source"
    source.mkdir()
    for name in "est_ds", "data_prep", "launch":
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in "setup.py", "LICENSE":
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "dist"]
    subprocess.run(command, cwd=source, check=True, capture_output=True)

    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        unpacked = tmp_path / "unpacked"
        tar.extractall(unpacked)
    (unpacked,) = unpacked.iterdir()
    command = [sys.executable, "setup.py", "-q", "egg_info"]
    subprocess.run(command, cwd=unpacked, check=True, capture_output=True)
    (information,) = unpacked.glob("*.egg-info")

    listed = {str(Requirement(line)) for line in metadata.PathDistribution(information).requires}
    assert listed == {str(pin) for pin in read_pins()}
    entry_points = (information / "entry_points.txt").read_text()
    assert "est-ds = est_ds.cli:main" in entry_points
