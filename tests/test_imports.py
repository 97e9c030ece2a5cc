"""Imports go down: a layer knows only those below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "est_ds"
LAYERS = [
    {"errors", "config", "run_file", "locking", "runtime", "preempt", "remote"},
    {"plans", "flops", "lr"},
    {"slicing", "data", "model", "checkpoints"},
    {"engine"},
    {"run", "metrics", "progress", "planning", "export", "report", "agreement", "verdict", "hosts",
     "divergence", "run_dir", "run_state"},
    {"watchdog", "launching", "doctor", "sentinel", "signals"},
    {"guard"},
    {"resuming", "restarting"},
    {"train"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))


def imported(file: Path) -> set[str]:
    tree = ast.parse((PACKAGE / file).read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return set(names)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down(file):
    own = LEVEL.get(file.parts[0].removesuffix(".py"))
    if file.name == "__init__.py" and len(file.parts) == 1:
        own = -1
    for name in imported(file):
        parts = name.split(".")
        if parts[0] == "est_ds" and len(parts) > 1:
            assert LEVEL[parts[1]] <= own, f"{file} imports {name}, which is above it"
        if parts[0] == "deepspeed":
            # All of it stays in engine/.
            assert file.parts[0] == "engine"
        if parts[0] == "torch":
            assert file.parts[0] not in ("plans", "flops.py", "lr.py", "config.py")


TESTS = Path(__file__).parent


def test_no_test_file_is_imported_by_another():
    """What tests share stands in `cases/` and in the files beside it."""
    found = {file.name: imported(file) for file in TESTS.glob("**/*.py")}
    assert not [pair for pair in found.items() if any(name.startswith("test_") for name in pair[1])]
