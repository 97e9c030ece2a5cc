"""Method x family: a drawn plan's sliced step equals the masked step of the unmodified model."""

from __future__ import annotations

import pytest
from test_methods import SECTIONS
from test_slicing_reference import (
    CASES,
    assert_close,
    installed,
    masked_step,
    our_model,
    run_step,
    shape_of,
)

from est_ds.errors import UserError
from est_ds.plans.methods import METHODS, build_method

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "t5")
STEPS = 100


def fitting(section: dict, num_layers: int) -> dict:
    """A section of the table of eight layers for a model of fewer."""
    section = dict(section)
    if isinstance(groups := section.get("balance_groups"), list):
        section["balance_groups"] = [num_layers - 1, 1]
    elif groups:
        section["balance_groups"] = min(groups, 2)
    if section["name"] == "stacking":
        depths = [min(p["layers"], num_layers - n) for n, p in enumerate(section["phases"][::-1])]
        depths[0] = num_layers
        section["phases"] = [
            {**p, "layers": d} for p, d in zip(section["phases"], depths[::-1], strict=True)
        ]
    if isinstance(section.get("always_keep"), list):
        section["always_keep"] = [i for i in section["always_keep"] if i < num_layers]
    if section["name"] == "raptr" and "layers" in section["phases"][0]:
        section["phases"] = [{"until": 0.5, "layers": num_layers - 1}, {"until": 1.0}]
    return section


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_sliced_step_of_every_method_on_every_family_equals_the_masked_step(method, family):
    case = CASES[family]
    shape = shape_of(case)
    model = our_model(case)
    subnetwork = installed(case, model)
    for name, section in SECTIONS.items():
        if section["name"] != method:
            continue
        built = fitting(section, shape.num_layers)
        if method == "stacking" and family == "t5":
            with pytest.raises(UserError, match="not all of one shape"):
                build_method(built, seed=1, steps=STEPS, shape=shape)
            continue
        drawn = build_method(built, seed=1, steps=STEPS, shape=shape)
        for step in (3, STEPS - 1):
            plan = drawn.plan(step)
            with subnetwork.active(plan):
                sliced = run_step(model, case)
            assert_close(sliced, masked_step(case, plan))
