"""Imports go down: a wing knows only those below it, and no file imports itself by others."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "est_ds"
# From the top of the house to the ground.
WINGS = (
    "cli",
    "reference",
    "studies",
    "analysis",
    "doctor",
    "verify_resume",
    "training",
    "launch",
    "score",
    "export",
    "report",
    "checkpoints",
    "run",
    "engine",
    "design",
    "slicing",
    "cost",
    "data",
    "plans",
    "ranks",
    "config",
    "disk",
    "errors",
    "est_ds",
)
# Modules outside the package, and the wings that may import them.
RESERVED = {
    "deepspeed": {"engine"},
    "torch": set(WINGS) - {"cost", "plans", "config", "disk", "errors"},
}
FILES = {
    ".".join(("est_ds", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def imported(file: Path) -> set[str]:
    """Names of all modules that a file imports, anywhere in it."""
    tree = ast.parse(file.read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


def wing_of(module: str) -> str:
    return [*module.split("."), "est_ds"][1]


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module):
    own = wing_of(module)
    for name in imported(FILES[module]):
        if name in FILES and wing_of(name) != own:
            assert WINGS.index(own) < WINGS.index(wing_of(name)), f"{module} imports {name}"
        allowed = RESERVED.get(name.partition(".")[0], {own})
        assert own in allowed, f"{module} imports {name}, which only {sorted(allowed)} may"


def test_no_file_imports_itself_by_way_of_others():
    graph = {module: imported(file) & set(FILES) - {module} for module, file in FILES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(f"a circle: {' <- '.join(e.args[1])}")


def test_few_modules_stand_beside_the_wings():
    assert len(list(PACKAGE.glob("*.py"))) <= 5


def test_no_test_file_is_imported_by_another():
    """What tests share stands in `cases/` and in the files beside it."""
    found = {file.name: imported(file) for file in Path(__file__).parent.glob("**/*.py")}
    assert not [pair for pair in found.items() if any(name.startswith("test_") for name in pair[1])]
