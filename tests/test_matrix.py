"""Method x family: a drawn plan's sliced step equals the masked step of the unmodified model."""

from __future__ import annotations

import pytest

from cases.families import (
    CASES,
    assert_close,
    installed,
    masked_step,
    our_model,
    run_step,
    shape_of,
)
from cases.methods import SECTIONS, fitting
from est_ds.errors import UserError
from est_ds.plans.methods import METHODS, build_method

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "t5")
STEPS = 100


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_sliced_step_of_every_method_on_every_family_equals_the_masked_step(method, family):
    case = CASES[family]
    shape = shape_of(case)
    model = our_model(case)
    subnetwork = installed(case, model)
    for section in SECTIONS.values():
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
