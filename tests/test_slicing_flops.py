"""A sliced step does fewer operations: `torch.utils.flop_counter` against `est_ds.cost.flops`.

What the counter sees depends on the attention kernel. The CPU's fused kernel
(`_scaled_dot_product_flash_attention_for_cpu`) is unknown to it and counts as nothing; the plain
one (`SDPBackend.MATH`) runs two batched products forward and four backward, 3 x 4 T^2 H D a
sequence, which is the closed form of `model`, as are those of a state-space scan; the GPU's fused
kernels count a seventh product, since they compute the scores again in the backward. None of them
halves causal scores.
"""

from __future__ import annotations

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cases.families import (
    CASES,
    Case,
    draw_plan,
    every_case,
    inputs_of,
    installed,
    our_model,
    run_step,
    shape_of,
)
from est_ds.cost.flops import Flops, step_flops
from est_ds.plans.methods.base import Load
from est_ds.plans.plan import Plan
from est_ds.plans.shape import Attention

PLANS = (
    dict(),
    dict(heads=2, columns=13),
    dict(heads=3, columns=1, rule="groups"),
    dict(heads=1, columns=36, skipped=(0, 2)),
    dict(heads=2, columns=13, without=((0, 0), (1, 1), (3, 0))),
    dict(heads=2, columns=13, skipped=(1,), positions=5),
)


def expected(case: Case, plan: Plan) -> Flops:
    """The closed form for exactly what the plan keeps."""
    shape, (source, *target) = shape_of(case), inputs_of(case).values()
    size = dict(tokens=source.numel(), sequence=source.shape[1])
    for ids in target:
        size.update(target_tokens=ids.numel(), target_sequence=ids.shape[1])
    loads = []
    for parts, layer in zip(shape.layers, plan.layers):
        if layer is None:
            loads.append(Load(0.0, (0,) * len(parts), (0,) * len(parts)))
            continue
        groups = [
            0
            if not isinstance(p, Attention)
            else p.key_value_groups
            if k.key_value_groups is None
            else len(k.key_value_groups)
            for p, k in zip(parts, layer.parts)
        ]
        at = source.shape[1] if layer.positions is None else len(layer.positions)
        share, squared = at / source.shape[1], (at / source.shape[1]) ** 2
        counts = tuple(k.count for k in layer.parts)
        loads.append(Load(1.0, counts, tuple(groups), share, squared))
    return step_flops(shape, loads, **size)


def count(model, case, subnetwork, plan, backend) -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    with subnetwork.active(plan), sdpa_kernel(backend), counter:
        run_step(model, case)
    return counter


def head_flops(model, case) -> int:
    """Forward and backward of the output head's products."""
    linears = [m for m in model.get_submodule(case.head).modules() if isinstance(m, nn.Linear)]
    *_, ids = inputs_of(case).values()
    return 3 * 2 * ids.numel() * sum(m.weight.numel() for m in linears)


@every_case
def test_matrix_products_of_the_layers_are_those_of_the_closed_form(case):
    model, shape = our_model(case), shape_of(case)
    subnetwork = installed(case, model)
    nothing = draw_plan(shape, skipped=tuple(range(shape.num_layers)))
    head = expected(case, nothing).model
    for counts in PLANS:
        if "positions" in counts and (shape.encoder_layers or shape.has_state_space):
            continue
        plan = draw_plan(shape, **counts)
        counter = count(model, case, subnetwork, plan, SDPBackend.MATH)
        by_operator = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        scores = by_operator.pop("aten.bmm", 0)
        for convolution in ("aten.convolution", "aten.convolution_backward"):
            by_operator.pop(convolution, None)  # of a channel with its own taps: no product
        flops = expected(case, plan)
        assert sum(by_operator.values()) - head_flops(model, case) == round(flops.blocks)
        assert scores == round(flops.model - head - flops.blocks)


@every_case
def test_matrix_products_of_the_head_are_those_of_the_closed_form(case):
    model, shape = our_model(case), shape_of(case)
    nothing = draw_plan(shape, skipped=tuple(range(shape.num_layers)))
    step = count(model, case, installed(case, model), nothing, SDPBackend.MATH)
    assert step.get_total_flops() == head_flops(model, case) == expected(case, nothing).model


def test_fused_attention_of_the_cpu_counts_as_nothing():
    """So that a figure of the counter is not taken for the whole step's."""
    case = CASES["llama"]
    model, shape = our_model(case), shape_of(case)
    subnetwork, plan = installed(case, model), draw_plan(shape, heads=2)
    fused, plain = (
        count(model, case, subnetwork, plan, backend).get_total_flops()
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    )
    batch, sequence = inputs_of(case)["input_ids"].shape
    kept = sum(layer.parts[0].count for layer in plan.layers)
    assert plain - fused == 3 * 4 * batch * sequence**2 * kept * shape.layers[0][0].head_dim
