"""FLOPs from first principles: numbers worked out by hand here, not by the code under test."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cases.plans import GPT2, TINYLLAMA, est, shape_of
from est_ds.cost import flops
from est_ds.plans.methods import build_method
from est_ds.plans.methods.base import Load, plan_loads
from est_ds.plans.shape import Attention, Mlp, ModelShape

# Two heads of width 3 over hidden 4, a gated MLP of 5 columns, one layer, a vocabulary of 11.
SMALL = ModelShape("llama", ((Attention(2, 1, 3, 4), Mlp(5, 4, 3)),), 4, 11, 16)


def test_dense_step_of_a_small_model_by_hand():
    # A token in the forward: q and o are 4 x 6, k and v 4 x 3: 2 (24 + 24 + 12 + 12) = 144.
    # Gate, up and down are 4 x 5: 2 * 60 = 120. Forward and backward: three times as much.
    step = flops.dense_flops(SMALL, tokens=10, sequence=7)
    assert step.blocks == 10 * 3 * (144 + 120)
    # Scores of 7 keys: for each of 2 heads 2 * 7 * 3, and as much against the values: 168.
    # The head: 2 * 4 * 11 = 88.
    assert step.model == 10 * 3 * (144 + 120 + 168 + 88)


def test_step_of_a_part_by_hand():
    # One head of two (the key and value stay): q, o 4 x 3, k, v 4 x 3; two columns of five.
    step = flops.step_flops(SMALL, [Load(1.0, (1, 2), (1, 0))], tokens=1, sequence=7)
    assert step.blocks == 3 * (2 * 4 * 12 + 2 * 3 * 4 * 2)
    assert step.model == step.blocks + 3 * (84 + 88)
    half = flops.step_flops(SMALL, [Load(0.5, (1, 2), (1, 0))], tokens=1, sequence=7)
    assert half.blocks == step.blocks / 2
    assert half.model == half.blocks + 3 * (42 + 88)


def test_a_full_plan_costs_the_dense_step():
    method = build_method(dict(name="full"), seed=0, steps=3, shape=TINYLLAMA)
    loads = plan_loads(method.plan(1), TINYLLAMA)
    dense = flops.dense_flops(TINYLLAMA, tokens=2048, sequence=2048)
    assert flops.step_flops(TINYLLAMA, loads, tokens=2048, sequence=2048) == dense
    assert flops.saved(method, sequence=2048) == flops.Flops(0.0, 0.0)


@pytest.mark.parametrize("head_rule", ["within_groups", "groups"])
@pytest.mark.parametrize("skip", ["layer", "sublayer"])
def test_expected_loads_are_those_of_the_plans_drawn(head_rule, skip):
    """Counts are exact and layers alike, so that every plan costs what the loads say."""
    method = est(
        shape_of(7), head_rule=head_rule, skip=skip, always_keep=[0], balance_groups=[4, 3]
    )
    expected = flops.step_flops(method.shape, method.loads(0), tokens=1, sequence=16)
    for step in range(10):
        loads = plan_loads(method.plan(step), method.shape)
        drawn = flops.step_flops(method.shape, loads, tokens=1, sequence=16)
        assert drawn.blocks == pytest.approx(expected.blocks)
        assert drawn.model == pytest.approx(expected.model)


def test_layers_that_differ_are_weighed_by_their_own_chance():
    """Always-kept layers with a larger MLP cost in every step; the mean over steps agrees."""
    big, small = (Mlp(columns, 8, 2) for columns in (60, 12))
    shape = ModelShape("bert", ((big,), (small,), (small,), (big,), (small,)), 8, 32, 16)
    method = est(
        shape,
        steps=4000,
        phases=[dict(until=1.0, layers=0.6)],
        always_keep=[0],
        balance_groups=[2, 3],
    )
    expected = flops.step_flops(shape, method.loads(0), tokens=1, sequence=16).blocks
    drawn = [
        flops.step_flops(shape, plan_loads(method.plan(s), shape), tokens=1, sequence=16).blocks
        for s in range(4000)
    ]
    assert sum(drawn) / len(drawn) == pytest.approx(expected, rel=0.01)


def test_est_saves_the_published_share_of_gpt2():
    """EST, GPT-2 (arXiv 2406.06962): 150k steps in phases up to 20k, 70k and 150k, p = 0.5.

    Blocks: half of the layers, heads and columns leave a quarter, then half. So
    (20 * 3/4 + 50 * 1/2) / 150 = 40 / 150 of the FLOPs are saved.
    """
    phases = [
        dict(until=20_000, layers=0.5, heads=0.5, columns=0.5),
        dict(until=70_000, heads=0.5, columns=0.5),
        dict(until=150_000),
    ]
    method = est(GPT2, steps=150_000, phases=phases)
    ratios = [flops.phase_ratios(method, i, sequence=1024) for i in range(3)]
    assert [r.blocks for r in ratios] == pytest.approx([0.25, 0.5, 1.0])
    saved = flops.saved(method, sequence=1024)
    assert saved.blocks == pytest.approx(40 / 150, abs=1e-9)
    # Model: a token's block products are 12 * 2 * 12 * 768^2, its scores 12 * 4 * 1024 * 768, and
    # the head, which is never dropped, 2 * 768 * 50257.
    blocks, scores, head = 24 * 12 * 768**2, 48 * 1024 * 768, 2 * 768 * 50257
    assert saved.model == pytest.approx(
        40 / 150 * (blocks + scores) / (blocks + scores + head), abs=1e-9
    )


def test_encoder_decoder_reads_two_streams_by_hand():
    """One layer each: the source has 6 tokens, the target 10 in two sequences of 5."""
    own, cross = Attention(2, 2, 3, 4), Attention(2, 2, 3, 4, cross=True)
    shape = ModelShape("t5", ((own,), (own, cross, Mlp(5, 4, 2))), 4, 11, None, encoder_layers=1)
    step = flops.dense_flops(shape, tokens=6, sequence=3, target_tokens=10, target_sequence=5)
    # A projection of a token is 2 * 4 * 6 = 48; the encoder has 4 of them, the decoder 4 and the
    # cross attention q and o on the target, k and v on the source. The MLP: 2 * 2 * 4 * 5 = 80.
    blocks = 6 * 4 * 48 + 10 * 4 * 48 + 10 * 2 * 48 + 6 * 2 * 48 + 10 * 80
    assert step.blocks == 3 * blocks
    # A query against T keys and values is 4 * T * 6.
    scores = 6 * 4 * 3 * 6 + 10 * 4 * 5 * 6 + 10 * 4 * 3 * 6
    assert step.model == 3 * (blocks + scores + 10 * 2 * 4 * 11)
    same = flops.dense_flops(shape, tokens=6, sequence=3)
    assert same == flops.dense_flops(
        shape, tokens=6, sequence=3, target_tokens=6, target_sequence=3
    )


def test_products_before_the_head_count_to_the_model():
    before = replace(SMALL, head_inner=16)
    plain, more = (flops.dense_flops(s, tokens=1, sequence=7) for s in (SMALL, before))
    assert more.blocks == plain.blocks and more.model == plain.model + 3 * 2 * 16
