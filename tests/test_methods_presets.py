"""The presets give the published savings, worked out here from the papers' own numbers."""

from __future__ import annotations

from math import exp
from pathlib import Path

import numpy as np
import pytest
import yaml

from cases.methods import SAVED_BY_PRESET
from cases.plans import encoder
from est_ds.config.run_file import load_run
from est_ds.cost import flops
from est_ds.errors import UserError
from est_ds.plans.methods import METHODS, build_method
from est_ds.plans.methods.base import Method
from est_ds.plans.shape import ModelShape
from est_ds.run.directory import write_config

PRESETS = Path(__file__).parents[1] / "configs" / "method"


def preset(name: str, steps: int | None = None, shape: ModelShape | None = None, **changes):
    section = {**yaml.safe_load((PRESETS / f"{name}.yaml").read_text()), **changes}
    default_shape, default_steps, _ = SAVED_BY_PRESET[name]
    return build_method(section, seed=0, steps=steps or default_steps, shape=shape or default_shape)


def test_every_preset_is_in_the_table_and_every_method_has_one():
    assert {path.stem for path in PRESETS.iterdir()} == set(SAVED_BY_PRESET)
    named = {yaml.safe_load(path.read_text())["name"] for path in PRESETS.iterdir()}
    assert named == set(METHODS)


@pytest.mark.parametrize("name", SAVED_BY_PRESET)
def test_preset_saves_what_its_file_says(name):
    method = preset(name)
    assert flops.saved(method, sequence=512).blocks == pytest.approx(
        SAVED_BY_PRESET[name][2], abs=5e-5
    )


@pytest.mark.parametrize("name", SAVED_BY_PRESET)
def test_preset_is_a_valid_short_run(name):
    method = preset(name, steps=24)
    assert [method.plan(step).step for step in range(24)] == list(range(24))


def ends(method: Method) -> list[int]:
    return [phase.until_step for phase in method.phases]


def test_est_gpt2_has_the_boundaries_of_the_paper():
    assert ends(preset("est_gpt2")) == [20_000, 70_000, 150_000]


def test_est_tinyllama_saves_a_quarter_of_the_blocks_by_hand():
    # Weights of a layer in 2048s: q and o 2 * 2048, k and v 2 * 256, the MLP 3 * 5632. With half
    # of the heads and columns, k and v stay.
    whole, narrow = 4096 + 512 + 16896, 2048 + 512 + 8448
    assert whole == 21504 and narrow / whole == pytest.approx(86 / 168)
    method = preset("est_tinyllama")
    first, second, last = ends(method)
    small = narrow / whole / 2  # 11 of 22 layers
    saved = (first * (1 - small) + (second - first) * (1 - narrow / whole)) / last
    assert round(saved, 4) == 0.2500
    assert flops.saved(method, sequence=2048).blocks == pytest.approx(saved, abs=1e-12)
    assert {len(method.plan(s).kept_layers) for s in range(0, first, 100)} == {11}


@pytest.mark.parametrize(
    ("name", "depths", "lengths", "speedup"),
    [
        ("raptr_bert", (6, 8, 10, 12), (1, 1, 1, 1), 4 / 3),
        ("raptr_ul2", (12, 16, 20, 24), (1, 2, 3, 4), 1.2),
    ],
)
def test_raptr_presets_have_the_stages_and_the_speedup_of_the_paper(name, depths, lengths, speedup):
    method = preset(name)
    steps = [phase.until_step - phase.from_step for phase in method.phases]
    assert steps == [n * method.steps // sum(lengths) for n in lengths]
    for phase, depth in zip(method.phases, depths):
        kept = method.plan(phase.from_step).kept_layers
        assert len(kept) == depth and {0, method.shape.num_layers - 1} <= set(kept)
    mean = sum(d * n for d, n in zip(depths, lengths)) / sum(lengths) / depths[-1]
    assert 1 / mean == pytest.approx(speedup)
    assert 1 / (1 - flops.saved(method, sequence=512).blocks) == pytest.approx(speedup)


@pytest.mark.parametrize(("layers", "depths"), [(12, [6, 8, 10, 12]), (24, [12, 16, 20, 24])])
@pytest.mark.parametrize("name", ["raptr_bert", "raptr_ul2"])
def test_raptr_presets_fit_other_depths(name, layers, depths):
    method = preset(name, shape=encoder(layers, 768))
    found = [len(method.plan(phase.from_step).kept_layers) for phase in method.phases]
    assert found == depths


def test_raptr_ul2_warm_trains_the_full_model_for_30k_steps_and_then_in_tenths():
    method = preset("raptr_ul2_warm")
    assert ends(method) == [30_000, 67_000, 141_000, 252_000, 400_000]
    depths = [len(method.plan(phase.from_step).kept_layers) for phase in method.phases]
    assert depths == [24, 12, 16, 20, 24]


def test_bert_runs_as_its_own_code_does():
    run = load_run(PRESETS.parent / "run" / "raptr_bert.yaml")
    optimizer, schedule = run.optimizer, run.schedule
    assert (optimizer.eps, optimizer.weight_decay, optimizer.betas) == (1e-6, 0.01, (0.9, 0.999))
    assert (schedule.name, schedule.final, run.steps) == ("linear", 0.0, 100_000)


@pytest.mark.parametrize("file", sorted((PRESETS.parent / "run").glob("*.yaml")), ids=str)
def test_method_of_a_run_file_stands_in_one_place(file, tmp_path):
    """A preset, which overrides still change; the resolved run needs no file."""
    if file.stem != "quickstart":  # the README shows it whole
        text = yaml.safe_load(file.read_text())["method"]
        assert (file.parent / text).resolve().parent == PRESETS
        assert load_run(file).method == yaml.safe_load((file.parent / text).read_text())
    run = load_run(file, ["method.phases.0.until=0.05", f"run_dir={tmp_path}"])
    assert run.method["phases"][0]["until"] == 0.05
    write_config(run)
    assert load_run(tmp_path).method == run.method


@pytest.mark.parametrize(
    ("name", "depths", "lengths"),
    [
        ("stacking_raptr", (6, 9, 12), (1, 1, 1)),
        ("midas", (6, 12, 18, 24), (1, 2, 3, 4)),
        ("g_stack", (6, 24), (1, 9)),
        ("zero_one", (1, 12), (4, 1)),
    ],
)
def test_stacking_presets_have_the_depths_and_lengths_of_their_papers(name, depths, lengths):
    method = preset(name)
    assert tuple(len(method.plan(p.from_step).kept_layers) for p in method.phases) == depths
    shares = [(p.until_step - p.from_step) / method.steps for p in method.phases]
    assert shares == pytest.approx([n / sum(lengths) for n in lengths], abs=1e-5)


@pytest.mark.parametrize("name", ["stacking", "stacking_raptr", "midas", "g_stack", "zero_one"])
@pytest.mark.parametrize("layers", [8, 12, 24, 32])
def test_stacking_presets_fit_other_depths(name, layers):
    method = preset(name, shape=encoder(layers, 768))
    assert len(method.plan(method.steps - 1).kept_layers) == layers
    assert all(method.growth(p.from_step) for p in method.phases[1:])


@pytest.mark.parametrize("mode", ["random", "double", "interleave"])
@pytest.mark.parametrize("first", [0, 1])
def test_one_expansion_is_made_in_every_way_of_its_paper(mode, first):
    changes = {"mode": mode, "phases": [dict(until=0.8, layers=first), dict(until=1.0, layers=1.0)]}
    if first == 0 and mode != "random":
        with pytest.raises(UserError, match="no layer to copy"):
            preset("zero_one", **changes)
        return
    method = preset("zero_one", **changes)
    growth = method.growth(80_000)
    assert (growth.new, growth.new_are_identity) == (
        (tuple(range(first, 12)) if mode == "random" else ()),
        False,
    )
    assert growth.copies == ({} if mode == "random" else {i: 0 for i in range(1, 12)})


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_phases_of_midas_last_as_alpha_says(alpha):
    method = preset("midas", alpha=alpha)
    lengths = [p.until_step - p.from_step for p in method.phases]
    total = sum(i**alpha for i in (1, 2, 3, 4))
    expected = [method.steps * i**alpha / total for i in (1, 2, 3, 4)]
    assert lengths == pytest.approx(expected, abs=1) and sum(lengths) == method.steps


def test_a_short_pld_saves_what_a_long_one_does():
    kept = [
        flops.phase_ratios(preset("pld", steps=n), 0, sequence=512).blocks
        for n in (1_000, 20_000, 1_000_000)
    ]
    assert kept == pytest.approx([0.7319] * 3, abs=2e-3)
    assert preset("pld", steps=1000).theta(np.array([10])) == pytest.approx(0.5 + 0.5 * exp(-1))


@pytest.mark.parametrize(("count_from", "mean_keep"), [(1, 0.7305), (0, 0.7720)])
def test_pld_keeps_0772_of_the_layers_only_when_they_count_from_zero(count_from, mean_keep):
    """With theta_bar 0.5 and gamma 0.001, 12 layers and 200k steps.

    The mean over layers of i / L is 13/24 for i = 1 .. 12, and 11/24 for i = 0 .. 11. Only the
    second gives 0.772.
    """
    steps, layers = 200_000, 12
    theta = sum(0.5 * exp(-0.001 * t) + 0.5 for t in range(steps)) / steps
    depth = sum(i / layers for i in range(count_from, layers + count_from)) / layers
    assert depth == pytest.approx((13 if count_from else 11) / 24)
    assert 1 - depth * (1 - theta) == pytest.approx(mean_keep, abs=5e-5)
    method = preset("pld", count_from=count_from, gamma=0.001)
    kept = flops.phase_ratios(method, 0, sequence=512).blocks
    assert kept == pytest.approx(1 - depth * (1 - theta), abs=1e-9)
    drawn = [len(method.plan(s).kept_layers) / layers for s in range(0, steps, 400)]
    assert sum(drawn) / len(drawn) == pytest.approx(mean_keep, abs=0.02)
