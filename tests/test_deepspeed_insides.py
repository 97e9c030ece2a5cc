"""Every name of DeepSpeed's insides that est_ds leans on is there, as it was then."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

import pytest

from est_ds.engine.patches import INSIDES, Inside


def owner_of(inside: Inside) -> Any:
    """The class or module; `deepspeed.comm.torch` is hidden by an attribute of that name."""
    if inside.owner in sys.modules:
        return sys.modules[inside.owner]
    module, _, name = inside.owner.rpartition(".")
    found = importlib.import_module(module)
    return sys.modules.get(inside.owner) or getattr(found, name, None)


@pytest.mark.parametrize("inside", INSIDES, ids=lambda i: f"{i.owner.rpartition('.')[2]}.{i.name}")
def test_an_inside_of_deepspeed_is_there(inside):
    owner = owner_of(inside)
    what = f"{inside.owner} ({inside.used})"
    assert owner is not None, f"DeepSpeed has no {what} any more"
    if inside.parameters is None:
        whose = "" if inspect.ismodule(owner) else "self"
        is_set = f"{whose}.{inside.name}" in inspect.getsource(owner)
        is_set = is_set or inside.name in getattr(owner, "__annotations__", {})
        assert is_set or hasattr(owner, inside.name), f"{what} has no {inside.name} any more"
        return
    method = getattr(owner, inside.name, None)
    assert callable(method), f"{what} has no method {inside.name} any more"
    parameters = tuple(p for p in inspect.signature(method).parameters if p != "self")
    assert parameters == inside.parameters, f"{what}: {inside.name} takes {parameters} now"
