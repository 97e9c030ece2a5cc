"""The new method that CONTRIBUTING.md shows: five files, and the tables of tests cover it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

PATCH = re.search(r"^```diff\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)[1]
NAME = "late_drop"


def checkout(folder: Path) -> dict[str, bytes]:
    """Copies what the checkout holds; returns it by name."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    files = {}
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            files[name] = (ROOT / name).read_bytes()
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(files[name])
    return files


def test_new_method_is_five_files_that_the_tests_cover_and_goes_without_a_trace(tmp_path):
    before = checkout(tmp_path)

    def run(*command: str, text: str | None = None) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, input=text, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def write_pages() -> None:
        run(sys.executable, "tests/test_preset_savings.py")
        run(sys.executable, "-m", "est_ds.cli", "fields", "--write", "configs")

    assert len(re.findall(r"^\+\+\+ ", PATCH, re.M)) <= 5
    run("git", "apply", "-", text=PATCH)
    write_pages()
    files = ("methods", "methods_presets", "preset_savings", "matrix", "fields")
    tests = [f"tests/test_{name}.py" for name in files]
    said = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", NAME)
    assert int(re.search(r"(\d+) passed", said)[1]) >= 10
    everything = f"{tests[0]}::test_digests_are_those_of_the_first_version"
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", everything)
    run("git", "apply", "-R", "-", text=PATCH)
    write_pages()
    after = {
        str(file.relative_to(tmp_path)): file.read_bytes()
        for file in tmp_path.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    assert after == before
