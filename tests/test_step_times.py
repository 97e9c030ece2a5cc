"""Step times of a run: of layouts and rounds, with intervals."""

from __future__ import annotations

import numpy as np
import pytest

from a_run import make_run
from est_ds.report.page import write_report
from est_ds.report.summary import summarise
from est_ds.report.text import print_summary
from est_ds.report.times import timing
from est_ds.run import step_times
from est_ds.run.metrics import MetricsFile
from est_ds.run.step_times import StepTimes, Turns


def write_turns(run_dir, rounds, others):
    """As if the machine had got slower from round to round, as much in every phase."""
    full = tuple(float(n) for n in range(1, rounds + 1))
    ratios = {"full": (2, 4, 1.0, 1.0), "small": (0, 4, 0.5, 0.25), "narrow": (1, 2, 0.75, 0.5)}
    turns = tuple(
        Turns(
            run="",
            name=name,
            phase=phase,
            num_steps=steps,
            wall_s=tuple(wall * s for s in full),
            cpu_s=tuple(cpu * s for s in full),
        )
        for name, (phase, steps, wall, cpu) in ratios.items()
    )
    times = StepTimes(turns=turns, processors=2, others=others, layout=A)
    times.write(run_dir / step_times.FILE)


def test_time_saved_is_that_of_rounds_measured_in_turns(tmp_path, capsys):
    """Of 10 steps 4 take half and 2 three quarters: 0.25; of processor seconds 0.4."""
    run_dir = make_run(tmp_path)
    write_turns(run_dir, rounds=8, others=1.5)
    summary = summarise(run_dir)
    assert [p.time_ratio for p in summary.phases] == pytest.approx([0.5, 0.75, 1.0])
    assert summary.saved_time == pytest.approx(0.25)
    assert summary.saved_between == pytest.approx((0.25, 0.25)) and summary.saving_tells
    assert summary.saved_cpu == pytest.approx(0.4)
    assert summary.efficiency == pytest.approx(0.25 / 0.32)
    print_summary(run_dir)
    said = capsys.readouterr().out
    assert max(map(len, said.strip().splitlines()[1:])) <= 80
    text = " ".join(said.split())
    assert "25.0% measured in 8 rounds of turns at the end of the run; 95 % interval 25.0%" in text
    assert "busy in these rounds: other processes used 1.5 of 2 processors; 40.0% of proc" in text
    assert "0.78 (time saved / model FLOPs saved)" in text


def test_few_rounds_and_a_quiet_machine_are_said(tmp_path, capsys):
    run_dir = make_run(tmp_path)
    write_turns(run_dir, rounds=5, others=0.1)
    print_summary(run_dir)
    text = " ".join(capsys.readouterr().out.split())
    assert "not known: an interval takes 6 rounds; 25.0% in 5 rounds of turns" in text
    assert "quiet: other processes used 0.1 of 2 processors" in text and "efficiency" not in text


def test_step_times_of_another_version_are_left_alone(tmp_path):
    run_dir = make_run(tmp_path)
    (run_dir / step_times.FILE).write_text('{"format": 9}')
    summary = summarise(run_dir)
    assert summary.turns is None and summary.saved_time == pytest.approx(1 - 24.8 / 40)


A = {"pipe": 1, "zero": 1, "replicas": 1, "micro": 2, "device": "cpu"}
B = {**A, "pipe": 2, "cuts": [2, 4]}


def timed_run(folder, starts, step_s):
    """A run of 80 steps: 20 of a quarter of the FLOPs, 20 of half of them, 40 of the full model.

    Args:
        starts: layout by the step at which processes started.
        step_s: time of a step after its start-up, from step, phase and layout.
    """
    run_dir = make_run(folder, num_steps=0, steps=80, phases=[20, 40, 80])
    for start, layout in starts.items():
        metrics = MetricsFile(run_dir, start, layout)
        for step in range(start, 80):
            phase = (step >= 20) + (step >= 40)
            active = (25, 50, 100)[phase]
            metrics.write_step(
                step=step,
                phase=("small", "na<rr>ow [b]", "full")[phase],
                loss=5.0,
                lr=1e-3,
                tokens=(step + 1) * 512,
                step_s=step_s(step, phase, layout) if step >= start + 3 else 50.0,
                flops_active=active,
                flops_dense=100,
                blocks_active=active,
                blocks_dense=100,
            )
        metrics.close()
    return run_dir


def test_times_are_medians_of_one_layout_with_an_interval(tmp_path, capsys):
    # The machine has three speeds by turns: 2 % faster, as it is, 2 % slower.
    def times(step, phase, layout):
        return (0.4, 0.6, 1.0)[phase] * (1 + (step % 3 - 1) / 50)

    run_dir = timed_run(tmp_path, {0: A, 40: A}, times)
    summary = summarise(run_dir)
    assert [p.timing.count for p in summary.phases] == [17, 20, 37]
    assert [p.median_step_s for p in summary.phases] == pytest.approx([0.4, 0.6, 1.0])
    # 20 steps at .4 and 20 at .6 of 80 save 12 + 8 of 80; FLOPs 15 + 10.
    assert summary.saved_time == pytest.approx(0.25)
    low, high = summary.saved_between
    # The worst: .4 x 1.02 / .98, .6 x 1.02 / .98, and the other way round.
    assert 0.25 - 0.25 * 0.041 <= low < 0.25 < high <= 0.25 + 0.25 * 0.041
    assert summary.efficiency == pytest.approx(0.8) and summary.saving_tells
    print_summary(run_dir)
    out = " ".join(capsys.readouterr().out.split())
    assert "25.0% measured: 60.0 s, and 80.0 s at full-model steps; 95 % interval 24." in out
    assert "0.80 (time saved / model FLOPs saved); 95 % interval 0.7" in out
    layout = "1 pipe stages x 1 replicas, ZeRO 1, micro-batch 2, cpu"
    assert f"74 in {layout}; left out: 6 after a start" in out


def test_times_of_two_layouts_are_never_compared(tmp_path, capsys):
    def times(step, phase, layout):
        return (0.4, 0.6, 1.0)[phase] * (8.0 if layout == A else 1.0)

    # In A nine steps of the second phase, in B the rest.
    summary = summarise(run_dir := timed_run(tmp_path, {0: A, 29: B}, times))
    assert summary.timed.layout == B and summary.timed.elsewhere == 29
    assert [p.timing and p.timing.count for p in summary.phases] == [None, 8, 40]
    assert [p.time_ratio for p in summary.phases] == [None, pytest.approx(0.6), 1.0]
    assert (summary.saved_time, summary.efficiency, summary.time_s) == (None, None, None)
    print_summary(run_dir)
    out = " ".join(capsys.readouterr().out.split())
    assert "time saved not known: no step of small was timed in this layout" in out
    assert "saving efficiency" not in out
    write_report(run_dir)
    # In B from the middle of the first phase on: nothing of A is used.
    summary = summarise(timed_run(tmp_path / "other", {0: A, 9: B}, times))
    assert summary.saved_time == pytest.approx(0.25)
    assert [p.timing.count for p in summary.phases] == [8, 20, 40]


def test_times_that_spread_too_far_give_no_figure(tmp_path, capsys):
    # Half of the time the machine is busy with something else.
    def times(step, phase, layout):
        return (0.4, 0.6, 1.0)[phase] * (5.0 if step % 20 >= 10 else 1.0)

    summary = summarise(run_dir := timed_run(tmp_path, {0: A}, times))
    low, high = summary.saved_between
    assert high - low > summary.saved_model and not summary.saving_tells
    print_summary(run_dir)
    out = " ".join(capsys.readouterr().out.split())
    assert "measured" not in out and "efficiency" not in out
    assert f"not known: between {low:.1%} and {high:.1%}" in out
    assert "?: too few steps, or times that spread further" in out


def test_first_step_of_a_phase_is_left_out_where_it_compiles(tmp_path):
    def times(step, phase, layout):
        return 90.0 if step in (20, 40) else 1.0

    summary = summarise(timed_run(tmp_path, {0: {**A, "compile": True}}, times))
    assert [p.timing.count for p in summary.phases] == [17, 19, 39]


@pytest.mark.parametrize(
    # Ranks of the tables for the median's interval at 95 % (Conover): 6: 1 and 6, 10: 2 and 9 ...
    ("count", "low", "high"),
    [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (20, 6, 15)],
)
def test_interval_is_that_of_order_statistics(count, low, high):
    times = [float(x) for x in np.random.default_rng(count).permutation(count) + 1]
    found = timing(times)
    assert found.between_s == (low, high) and found.count == count
    assert found.median_s == (count + 1) / 2
    assert timing(times[:5]).between_s is None and timing([]) is None


def test_interval_holds_the_median_where_neighbours_are_alike():
    # 200 steps in stretches of 10 that a machine's load makes slower or faster together.
    held = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        times = np.repeat(np.exp(0.3 * draw.standard_normal(20)), 10)
        times *= np.exp(0.01 * draw.standard_normal(200))
        low, high = timing(times.tolist()).between_s
        held += low <= 1.0 <= high
    # 95 % or more; of 200, 6 deviations of 3.1 lower. By single steps it would be about half.
    assert held >= 190 - 18
