"""Sliced steps against masked steps of the unmodified library model, over every family.

The table of families and the reference are in `test_slicing_reference.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cases.families import (
    assert_close,
    assert_equal,
    draw_plan,
    every_case,
    inputs_of,
    installed,
    library_model,
    masked_step,
    our_model,
    run_step,
    shape_of,
    width_of,
)
from est_ds.plans.methods import build_method
from est_ds.plans.shape import Attention
from est_ds.slicing.leaf import Held, Leaf

# Counts that a table of plans tries: all odd ones, and the least and the most.
PLANS = {
    "columns": dict(columns=13),
    "one_column": dict(columns=1),
    "heads": dict(heads=2),
    "one_head": dict(heads=1),
    "groups": dict(heads=3, rule="groups"),
    "one_group": dict(heads=1, rule="groups"),
    "heads_and_columns": dict(heads=2, columns=31),
    "layers": dict(skipped=(1, 2)),
    "all": dict(heads=2, columns=17, skipped=(1,)),
    "parts": dict(without=((0, 0), (1, 1), (3, 0)), heads=2, columns=13, scale=2.0),
    "inverse_layer_scale": dict(heads=1, columns=7, skipped=(0, 2), scale=2.0),
    "sqrt_layer_scale": dict(skipped=(1, 3), scale=2.0**0.5),
}
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
every_plan = pytest.mark.parametrize("counts", PLANS.values(), ids=PLANS.keys())
checkpointing = pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])


def sliced_step(case, model, subnetwork, plan):
    with subnetwork.active(plan):
        return run_step(model, case)


def traces(model):
    """Everything that installing could leave behind: classes and attributes of every module."""
    return [(name, type(m), dict(m.__dict__)) for name, m in model.named_modules()]


@every_case
def test_install_changes_no_name_and_uninstall_leaves_no_trace(case):
    model = our_model(case)
    before = traces(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    subnetwork = installed(case, model)
    assert list(model.state_dict()) == list(weights)
    assert [name for name, _ in model.named_parameters()] == names
    assert [type(m).__name__ for m in model.modules()] == [t.__name__ for _, t, _ in before]
    with subnetwork.active(draw_plan(shape_of(case), heads=2, columns=3, skipped=(0,))):
        pass
    subnetwork.uninstall()
    assert traces(model) == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@every_case
@checkpointing
def test_plan_that_keeps_everything_is_the_unmodified_model_bit_for_bit(case, checkpointing):
    model = our_model(case)
    library = library_model(case)
    if checkpointing:
        for either in (model, library):
            either.gradient_checkpointing_enable({"use_reentrant": False})
    theirs = run_step(library, case)
    ours = sliced_step(case, model, installed(case, model), draw_plan(shape_of(case)))
    assert_equal(ours, theirs)


@every_case
@every_plan
def test_sliced_step_equals_masked_step(case, counts):
    model = our_model(case)
    plan = draw_plan(shape_of(case), **counts)
    theirs = masked_step(case, plan)
    assert_close(sliced_step(case, model, installed(case, model), plan), theirs)


@every_case
def test_checkpointed_sliced_step_equals_masked_step(case):
    model = our_model(case)
    plan = draw_plan(shape_of(case), heads=2, columns=13, skipped=(0, 2))
    theirs = masked_step(case, plan)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(sliced_step(case, model, installed(case, model), plan), theirs)


@every_case
def test_any_layer_may_be_skipped(case):
    model, shape = our_model(case), shape_of(case)
    subnetwork = installed(case, model)
    for i in range(shape.num_layers):
        plan = draw_plan(shape, heads=1, columns=5, skipped=(i,), seed=i)
        assert_close(sliced_step(case, model, subnetwork, plan), masked_step(case, plan))


@every_case
def test_any_part_may_be_skipped(case):
    model, shape = our_model(case), shape_of(case)
    subnetwork = installed(case, model)
    for i, parts in enumerate(shape.layers):
        for p in range(len(parts)):
            plan = draw_plan(shape, heads=2, columns=5, without=((i, p),))
            assert_close(sliced_step(case, model, subnetwork, plan), masked_step(case, plan))


@every_case
def test_layer_without_its_parts_is_a_skipped_layer(case):
    model, shape = our_model(case), shape_of(case)
    subnetwork = installed(case, model)
    last = shape.num_layers - 1
    for i in (0, last):
        parts = tuple((i, p) for p in range(len(shape.layers[i])))
        without = sliced_step(case, model, subnetwork, draw_plan(shape, without=parts))
        skipped = sliced_step(case, model, subnetwork, draw_plan(shape, skipped=(i,)))
        assert_close(without, skipped)


@every_case
def test_layers_may_keep_different_counts(case):
    """Some layers whole, some sliced, one skipped, in each stack of layers."""
    model, shape = our_model(case), shape_of(case)
    subnetwork = installed(case, model)
    kinds = [
        draw_plan(shape, heads=2, columns=5),
        draw_plan(shape),
        draw_plan(shape, heads=1, scale=2.0),
        draw_plan(shape, skipped=tuple(range(shape.num_layers))),
        draw_plan(shape, columns=31),
    ]
    for turn in range(len(kinds)):
        layers = [kinds[(i + turn) % len(kinds)].layers[i] for i in range(shape.num_layers)]
        plan = replace(kinds[0], layers=tuple(layers))
        assert_close(sliced_step(case, model, subnetwork, plan), masked_step(case, plan))


@every_case
def test_every_count_of_heads(case):
    """Or of the columns of a state-space mixer."""
    model, shape = our_model(case), shape_of(case)
    subnetwork = installed(case, model)
    part = shape.layers[0][0]
    if isinstance(part, Attention):
        groups = part.key_value_groups
        rules = (("within_groups", part.heads // groups), ("groups", groups))
        kept = [dict(heads=n, rule=rule) for rule, most in rules for n in range(1, most + 1)]
    else:  # every eleventh
        kept = [dict(columns=n * part.groups) for n in range(1, part.units // part.groups, 11)]
    for seed, counts in enumerate(kept):
        plan = draw_plan(shape, seed=seed, **counts)
        assert_close(sliced_step(case, model, subnetwork, plan), masked_step(case, plan))


@every_case
@pytest.mark.parametrize("rule", ["within_groups", "groups"])
def test_drawn_plans_slice_units_of_every_family(case, rule):
    """Plans as the method draws them; without grouped-query attention, heads with keys, values."""
    model, shape = our_model(case), shape_of(case)
    subnetwork = installed(case, model)
    phase = {"until": 1.0, "layers": 0.6, "columns": 0.5}
    section = {"name": "est", "phases": [phase]}
    if shape.has_attention:
        phase["heads"], section["head_rule"] = 0.4, rule
    method = build_method(section, seed=7, steps=10, shape=shape)
    for step in (0, 9):
        plan = method.plan(step)
        for layer in filter(None, plan.layers):
            assert all(kept.count < kept.total for kept in layer.parts)
        assert_close(sliced_step(case, model, subnetwork, plan), masked_step(case, plan))


@every_case
def test_plans_follow_one_another_without_a_trace(case):
    model, shape = our_model(case), shape_of(case)
    subnetwork = installed(case, model)
    plan = draw_plan(shape, heads=2, columns=13, skipped=(1,))
    first = sliced_step(case, model, subnetwork, plan)
    for seed in range(3):
        sliced_step(case, model, subnetwork, draw_plan(shape, heads=1, columns=5, seed=seed))
    assert_equal(sliced_step(case, model, subnetwork, plan), first)
    assert_equal(run_step(model, case), run_step(library_model(case), case))


@every_case
def test_gradients_outside_the_subnetwork_are_zero(case):
    model, shape = our_model(case), shape_of(case)
    plan = draw_plan(shape, heads=1, columns=5, skipped=(1,))
    grads = sliced_step(case, model, installed(case, model), plan).grads
    layers = [
        f"{path}.{i}." for path, _ in case.layers for i in range(len(model.get_submodule(path)))
    ]
    skipped = [grad for name, grad in grads.items() if name.startswith(layers[1])]
    assert skipped and not any(grad.any() for grad in skipped)
    for path, kept, part in zip(case.layers[0][1], plan.layers[0].parts, shape.layers[0]):
        grad_OI = grads[f"{layers[0]}{path}.weight"]
        if not isinstance(model.get_submodule(f"{layers[0]}{path}"), nn.Linear):
            grad_OI = grad_OI.T
        size = width_of(part)
        used = grad_OI.unflatten(1, (-1, size)).abs().sum((0, 2)).nonzero().flatten()
        assert used.tolist() == kept.units.tolist()


@every_case
def test_units_that_replicas_send_are_the_whole_gradient(case):
    model = our_model(case)
    subnetwork = installed(case, model)
    plan = draw_plan(shape_of(case), heads=1, columns=5, rule="groups")
    with subnetwork.active(plan):
        run_step(model, case)
        found = subnetwork.kept_units()
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices = sum(
        len(module.est_dims()) for module in model.modules() if isinstance(module, (Leaf, Held))
    )
    assert len(found) == matrices > 0
    for parameter, kept in found.items():
        units = parameter.new_empty(kept.shape(parameter))
        kept.take(parameter.grad, units)
        again = torch.zeros_like(parameter)
        kept.put(units, again)
        assert units.numel() < parameter.numel(), names[parameter]
        assert torch.equal(again, parameter.grad), names[parameter]
    assert not subnetwork.kept_units()


@every_case
def test_plan_is_undone_when_the_step_raises(case):
    model = our_model(case)
    subnetwork = installed(case, model)
    before = traces(model)
    with pytest.raises(KeyError):
        with subnetwork.active(draw_plan(shape_of(case), heads=1, columns=5, skipped=(1,))):
            raise KeyError
    assert traces(model) == before
    assert_equal(run_step(model, case), run_step(library_model(case), case))


@every_case
def test_plan_of_another_depth_is_refused(case):
    model, shape = our_model(case), shape_of(case)
    subnetwork = installed(case, model)
    plan = draw_plan(shape)
    short = replace(plan, layers=plan.layers[:-1])
    with pytest.raises(ValueError, match=f"{shape.num_layers - 1} layers"):
        with subnetwork.active(short):
            pass


@every_case
def test_saved_model_loads_into_the_library(case, tmp_path):
    import transformers

    model = our_model(case)
    installed(case, model)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, case.auto_class).from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("transformers.models.")
    inputs = inputs_of(case)
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, loaded.eval()(**inputs).logits)
