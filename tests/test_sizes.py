"""A function fits on a screen and takes few things; the loop is one screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, MAX_PARAMETERS, LOOP_LINES = 60, 5, 50
FILES = sorted(f for package in ("est_ds", "data_prep") for f in (ROOT / package).rglob("*.py"))


def functions(file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, lines and parameters (less self and cls) of every function of a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            parameters = len(set(names) - {"self", "cls"})
            yield node.name, node.end_lineno - node.lineno + 1, parameters


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_functions_are_short_and_take_few_parameters(file):
    for name, lines, parameters in functions(file):
        assert lines <= MAX_LINES, f"{name} has {lines} lines"
        assert parameters <= MAX_PARAMETERS, f"{name} has {parameters} parameters"


def test_the_training_loop_is_one_screen():
    lengths = {n: lines for n, lines, _ in functions(ROOT / "est_ds/training/loop.py")}
    assert lengths["_train"] < LOOP_LINES
