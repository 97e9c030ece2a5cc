"""Method x family: a drawn plan's step, sliced or masked, equals the masked step of the library's
unmodified model."""

from __future__ import annotations

import pytest
import torch

from cases.families import (
    CASES,
    assert_close,
    installed,
    masked_step,
    our_model,
    run_step,
    shape_of,
)
from cases.methods import SECTIONS, fitting, refusal, taken
from est_ds.errors import UserError
from est_ds.plans.methods import METHODS, build_method

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "t5", "mamba", "mamba2")
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
        if message := refusal(section, family):
            with pytest.raises(UserError, match=message):
                refused = fitting(section, shape.num_layers)
                build_method(refused, seed=1, steps=STEPS, shape=shape)
        if (section := taken(section, family)) is None:
            continue
        built = fitting(section, shape.num_layers)
        drawn = build_method(built, seed=1, steps=STEPS, shape=shape)
        for step in (3, STEPS - 1):
            plan = drawn.plan(step)
            with subnetwork.active(plan):
                sliced = run_step(model, case)
            assert_close(sliced, masked_step(case, plan))


UNMASKED = ("full", "token_drop")
ALIKE = ("mistral", "qwen2", "qwen3")  # in code that masks they are llama


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow if f in ALIKE else ()) for f in FAMILIES]
)
def test_masked_compute_of_every_method_equals_the_masked_step(family):
    """Gradients of what is left out are zero, where the reference's are."""
    case = CASES[family]
    shape = shape_of(case)
    model = our_model(case)
    subnetwork = installed(case, model, masked=True)
    for section in SECTIONS.values():
        section = taken(section, family)
        if section is None or section["name"] in UNMASKED:
            continue
        built = fitting(section, shape.num_layers) | {"compute": "masked"}
        plan = build_method(built, seed=1, steps=STEPS, shape=shape).plan(3)
        with subnetwork.active(plan):
            masked = run_step(model, case)
        assert not subnetwork.skipped
        expected = masked_step(case, plan)
        assert_close(masked, expected)
        for name, grad in expected.grads.items():
            assert torch.equal(masked.grads[name] == 0, grad == 0), name
