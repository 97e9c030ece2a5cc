"""The masked models of `cases/families.py`, to which sliced ones are compared."""

from __future__ import annotations

from cases.families import (
    assert_equal,
    draw_plan,
    every_case,
    library_model,
    masked_step,
    run_step,
    shape_of,
)


@every_case
def test_masks_change_the_step(case):
    """The reference is no empty shell: dropping a head, a column or a layer shows."""
    shape = shape_of(case)
    full = masked_step(case, draw_plan(shape))
    assert_equal(full, run_step(library_model(case), case))
    kept = [dict(columns=36), dict(skipped=(0,))]
    if shape.has_attention:
        kept.append(dict(heads=1))
    for plan in (draw_plan(shape, **counts) for counts in kept):
        masked = masked_step(case, plan)
        assert (masked.logits - full.logits).abs().max() > 1e-2
