"""The learning rate of every step, and what a run says of its updates."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import refused, train
from est_ds.checkpoints.reader import WEIGHT, Checkpoint
from est_ds.config.run_file import load_run
from est_ds.design import make_design
from est_ds.engine.moved import PLACES, places
from est_ds.plans.phases import Phase
from est_ds.report.summary import summarise
from est_ds.report.text import fact_rows
from est_ds.run.metrics import read_metrics
from est_ds.training.record import MEASURED, _measured_steps
from est_ds.verify_resume.short import shortened

PHASES = (
    "method={name: raptr, phases: [{until: 8, layers: 2, lr: 2.0}, {until: 14, layers: 3}, "
    "{until: 20, lr: 0.5}]}"
)


def rates(run, *overrides) -> list[float]:
    """Of the 20 steps of the tiny run, whose peak is made 1 here."""
    config = load_run(run, ["optimizer.lr=1.0", *overrides])
    design = make_design(config)
    return [design.learning_rate(step) for step in range(config.steps)]


def test_linear_falls_in_a_straight_line_to_zero_one_step_after_the_last(tiny_run):
    found = rates(tiny_run, "schedule={name: linear, warmup: 4}")
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, *(n / 16 for n in range(16, 0, -1))])
    found = rates(tiny_run, "schedule={name: linear, warmup: 0, final: 0.5}")
    assert found == pytest.approx([0.5 + 0.5 * n / 20 for n in range(20, 0, -1)])


def test_inverse_sqrt_has_at_step_t_the_root_of_warmup_over_t(tiny_run):
    found = rates(tiny_run, "schedule={name: inverse_sqrt, warmup: 4}")
    expected = [0.25, 0.5, 0.75, 1.0, *(math.sqrt(4 / t) for t in range(5, 21))]
    assert found == pytest.approx(expected)
    assert found[15] == pytest.approx(0.5)  # at four times the warm-up


@pytest.mark.parametrize(
    ("shape", "fallen"),
    [("linear", [0.25, 0.5, 0.75, 1.0]), ("sqrt", [0.5, 0.5**0.5, 0.75**0.5, 1.0])],
)
def test_wsd_decays_by_the_share_that_is_done_or_its_root(shape, fallen, tiny_run):
    schedule = f"schedule={{name: wsd, warmup: 2, decay: 4, final: 0.1, shape: {shape}}}"
    expected = [0.5, *[1.0] * 15, *(1 - 0.9 * f for f in fallen)]
    assert rates(tiny_run, schedule) == pytest.approx(expected)


def test_rate_of_a_phase_is_its_factor_times_the_schedule(tiny_run):
    constant = "schedule={name: wsd, warmup: 0, decay: 0}"
    assert rates(tiny_run, constant, PHASES) == [2.0] * 8 + [1.0] * 6 + [0.5] * 6


def test_rate_rises_anew_after_every_boundary_but_the_start(tiny_run):
    again = "schedule={name: wsd, warmup: 2, decay: 0, rewarm: {steps: 4, at: boundaries}}"
    ramp = [0.25, 0.5, 0.75, 1.0]
    expected = [1.0, *[2.0] * 7, *ramp, 1.0, 1.0, *(0.5 * r for r in ramp), 0.5, 0.5]
    assert rates(tiny_run, again, PHASES) == pytest.approx(expected)


def test_short_version_of_a_run_warms_again_in_proportion(tiny_run):
    overrides = ["steps=200", "schedule.rewarm={steps: 40}", "schedule.warmup=20"]
    overrides += [f"method.phases.{i}.until={u}" for i, u in enumerate((80, 140, 200))]
    short = shortened(load_run(tiny_run, overrides), 20)
    rate = [make_design(short).learning_rate(s) for s in range(20)]
    assert short.schedule.rewarm.steps == 0.2
    assert rate[8] < rate[9] < rate[10] < rate[11] > rate[12]
    brief = shortened(load_run(tiny_run, [*overrides, "schedule.rewarm.steps=8"]), 20)
    make_design(brief)
    assert brief.schedule.rewarm is None


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["schedule.rewarm={steps: 2}", "method={name: full}"], ["schedule.rewarm", "no boundary"]),
        (["schedule.rewarm={steps: 7}"], ["rewarm.steps=7", "phase 'narrow'", "at most 6"]),
        (["schedule.rewarm={steps: 0}"], ["rewarm.steps=0"]),
        (["schedule.rewarm={steps: 1}"], ["rewarm.steps=1", "at least 2"]),
        (["schedule.rewarm={steps: 0.01}"], ["rewarm.steps=0.01", "it is 0 of steps=20"]),
        (["schedule.rewarm={steps: 2, at: 5}"], ["rewarm.at=5", "boundaries"]),
        (["schedule={name: inverse_sqrt, warmup: 0}"], ["warmup=0", "set it above 0"]),
        (["schedule={name: inverse_sqrt, final: 0.1}"], ["schedule.final", "Known here"]),
        (["schedule={name: wsd, decay: 0, shape: sqrt}"], ["shape=sqrt has no effect"]),
        (["schedule.shape=sqrt"], ["unknown key 'schedule.shape'"]),
        (["method.phases.0.lr=0.0"], ["method.phases.0.lr=0.0", "greater than 0"]),
        (["method={name: pld}", "method.lr=2.0"], ["unknown key 'method.lr'"]),
        (["method={name: full, phases: [{until: 1.0, lr: 2.0}]}"], ["unknown key 'method.phases'"]),
    ],
)
def test_what_cannot_take_effect_is_refused(overrides, named, tiny_run, tmp_path, capsys):
    error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path}/run", *overrides)
    assert all(text in error for text in named), error


def test_sampled_places_depend_on_the_name_and_lie_one_in_every_range():
    assert places("a", 40).tolist() == list(range(40))
    found = places("model.layers.0.mlp.up_proj.weight", 7 * PLACES + 3)
    assert len(found) == PLACES and found[-1] < 7 * PLACES + 3
    assert {int(gap) for gap in np.diff(found)} <= set(range(1, 15))
    assert (places("model.layers.1.mlp.up_proj.weight", 7 * PLACES + 3) != found).mean() > 0.7
    columns = np.bincount(places("w", 64 * 4096) % 64, minlength=64)
    assert columns.min() > 0  # and not one column of the matrix alone


def matrices(run_dir: Path, step: int) -> torch.Tensor:
    """All weights of the layers' matrices after `step` steps, flat."""
    with Checkpoint(run_dir / "checkpoints" / f"step_{step:08d}") as held:
        shapes = held.index.parameters.items()
        names = [(n, math.prod(s)) for n, s in shapes if "layers." in n and len(s) > 1]
        return torch.cat([held.read(name, WEIGHT, 0, size) for name, size in names])


def test_run_says_how_far_its_steps_go_and_which_are_clipped(tiny_run, tmp_path):
    """Against the weights of its checkpoints in whole."""
    overrides = ["steps=6", "checkpoint.every=1", "optimizer.clip=1.6", "schedule.warmup=0"]
    overrides += [f"method.phases.{i}.until={u}" for i, u in enumerate((2, 4, 6))]
    one = tmp_path / "run"
    done = train(tiny_run, f"run_dir={one}", "parallel={}", *overrides, processes=1)
    assert done.returncode == 0, done.stderr
    lines, _ = read_metrics(one)
    found = [line["update_rms"] for line in lines]
    for step in range(1, 6):
        moved = matrices(one, step + 1) - matrices(one, step)
        rms = moved.double().square().mean().sqrt().item() / lines[step]["lr"]
        assert found[step] == pytest.approx(rms, rel=0.03)
    clipped = [line["clipped"] for line in lines]
    assert clipped == [line["grad_norm"] > 1.6 for line in lines] and len(set(clipped)) == 2
    by_phase = [p.steps for p in summarise(one).phases]
    assert [s.clipped for s in by_phase] == [sum(clipped[i : i + 2]) / 2 for i in (0, 2, 4)]
    middle = math.sqrt((found[2] ** 2 + found[3] ** 2) / 2)
    assert (by_phase[1].update_rms, by_phase[1].measured) == (pytest.approx(middle), 2)
    said = f"of the logged steps clipped, update {middle:.2g} x lr (RMS, 2 steps)"
    assert f"phase narrow: {sum(clipped[2:4]) * 50}% {said}" in done.stdout
    rows = dict(fact_rows(summarise(one)))
    assert f"narrow {middle:.2g}" in rows["update / lr"] and "small " in rows["clipped"]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("data 2, ZeRO 1", marks=pytest.mark.slow),
        *("data 2, ZeRO 3", "pipe 2 x data 2, ZeRO 1"),
    ],
)
def test_updates_are_measured_alike_in_every_layout(layout, in_layouts):
    [one, other] = (read_metrics(in_layouts[n, "est", "fp32"])[0] for n in ("1 process", layout))
    found, expected = ([line["update_rms"] for line in lines] for lines in (other, one))
    assert found == pytest.approx(expected, rel=1e-4) and len(set(found)) == 20
    assert [line["clipped"] for line in other] == [line["clipped"] for line in one]


def test_measured_steps_are_logged_ones_that_lie_evenly_over_the_phase():
    phase = Phase("p", 100, 1100)
    assert _measured_steps(Phase("p", 3, 9), 1) == set(range(3, 9))
    assert _measured_steps(Phase("p", 3, 9), 4) == {3, 7, 8}  # logged, and the phase's last
    found = sorted(_measured_steps(phase, 10))
    assert len(found) == MEASURED and (found[0], found[-1]) == (109, 1099)
    assert all((step + 1) % 10 == 0 for step in found)
    assert {b - a for a, b in pairwise(found)} <= {10, 20}
    assert _measured_steps(phase, 5000) == {1099}
