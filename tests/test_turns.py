"""Step times measured in turns: they change nothing of a run, and what they say is worked out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cases.tiny import TINY_MODEL
from conftest import tensorboard_points
from est_ds.checkpoints.index import read_index
from est_ds.report.summary import summarise
from est_ds.run.metrics import read_metrics
from est_ds.run.step_times import FILE, StepTimes, Turns, read_step_times
from est_ds.training.time_runs import TimedRun, measure_runs
from est_ds.training.turns import FEWEST, _spread
from layouts import LAYOUTS, MORE_LAYOUTS, name_of
from workers import train_all

PHASES = (
    "{name: small, until: 2, layers: 0.5, heads: 0.5, columns: 0.5}, "
    "{name: narrow, until: 4, heads: 0.5, columns: 0.5}, {name: full, until: 6}"
)
EST = f"method={{name: est, balance_groups: 2, phases: [{PHASES}]}}"
COMMON = ["steps=6", "schedule={name: cosine}", "evaluate={every: 6, sequences: 4}"]
ON, OFF = "log.step_times=true", "log.step_times=false"
DROP = "method={name: layer_drop, drop: 0.5, balance_groups: 2}"
FAST, PIPE = "data 2, ZeRO 3", "pipe 2, ZeRO 1"


def both(layout: str) -> list[tuple[str, str, list[str]]]:
    return [(layout, on, [*COMMON, EST, on]) for on in (ON, OFF)]


@pytest.fixture(scope="module")
def trained(synthetic_run, tmp_path_factory) -> Path:
    """The folder with runs in the fast layouts."""
    folder = tmp_path_factory.mktemp("turns")
    return train(folder, synthetic_run, [*both(FAST), (PIPE, "drop", [*COMMON, DROP, ON])])


def train(folder: Path, synthetic_run: Path, cases: list[tuple[str, str, list[str]]]) -> Path:
    jobs = []
    for layout, name, overrides in cases:
        run_dir = f"run_dir={folder / name_of(layout, name)}"
        given = [run_dir, *{**LAYOUTS, **MORE_LAYOUTS}[layout][1], *overrides]
        jobs.append({"run": synthetic_run, "overrides": given, "measures": True})
    train_all(folder / "log", 2, jobs)
    return folder


def check_times(times: StepTimes, turns: list[tuple[str, str, int | None, int]]) -> None:
    assert [(t.run, t.name, t.phase, t.num_steps) for t in times.turns] == turns
    for part in times.turns:
        assert len(part.wall_s) == len(part.cpu_s) == times.num_rounds >= FEWEST
        assert min(*part.wall_s, *part.cpu_s) > 0 and part.device_s is None
    assert times.processors >= 1 and 0 <= times.others <= times.processors


def check_same(folder: Path, layout: str) -> None:
    on, off = (folder / name_of(layout, name) for name in (ON, OFF))
    last = Path("checkpoints", "step_00000006")
    assert read_index(on / last).files == read_index(off / last).files
    lines = [
        [(e["step"], e["loss"], e["grad_norm"]) for e in read_metrics(d)[0]] for d in (on, off)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    points = [tensorboard_points(d) for d in (on, off)]
    assert points[0] == points[1] and points[0]["train/loss"] == list(range(1, 7))
    full, small, narrow = ("", "full", 2, 2), ("", "small", 0, 2), ("", "narrow", 1, 2)
    check_times(read_step_times(on), [full, small, narrow])
    assert read_step_times(off) is None and not (off / FILE).exists()


def test_measuring_in_turns_changes_nothing_of_a_run(trained):
    check_same(trained, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [PIPE, "data 2, ZeRO 1", "data 2, ZeRO 2, offload"])
def test_measuring_in_turns_changes_nothing_in_any_layout(layout, synthetic_run, tmp_path):
    check_same(train(tmp_path, synthetic_run, both(layout)), layout)


def test_a_run_that_never_trains_the_full_model_is_compared_with_it(trained):
    run_dir = trained / name_of(PIPE, "drop")
    times = read_step_times(run_dir)
    check_times(times, [("", "full model", None, 0), ("", "layer_drop", 0, 6)])
    assert summarise(run_dir).saved_time is not None
    assert all(e["step_cpu_s"] > 0 for e in read_metrics(run_dir)[0])


def test_the_rounds_of_a_phase_lie_evenly_over_it():
    assert [_spread(i) for i in range(7)] == [0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]


def test_seconds_of_a_run_are_those_of_its_phases_by_their_steps():
    """Round by round: (30 x 1 + 10 x 2) / 40 of 2 s, and (30 x 1.2 + 10 x 3) / 40 of 3 s."""
    turns = (
        Turns(run="dense", name="full", phase=0, num_steps=9, wall_s=(2, 3), cpu_s=(1, 1)),
        Turns(run="arm", name="a", phase=0, num_steps=30, wall_s=(1.0, 1.2), cpu_s=(0.5, 0.25)),
        Turns(run="arm", name="b", phase=1, num_steps=10, wall_s=(2.0, 3.0), cpu_s=(1, 1)),
    )
    times = StepTimes(turns=turns, processors=8, others=0.9, layout={})
    assert times.run_ratios("arm") == pytest.approx([0.625, 0.55])
    assert times.run_ratios("arm", "cpu_s") == pytest.approx([0.625, 0.4375])
    assert times.is_busy and not times.model_copy(update={"others": 0.7}).is_busy
    on_gpu = [t.model_copy(update={"device_s": (1.0, 1.0)}) for t in turns]
    assert times.model_copy(update={"turns": on_gpu}).run_ratios("arm") == [1.0, 1.0]


RUNS = ("dense", "est", "shallow")


def check_runs(run, layout: list[str], folder) -> None:
    model = {**TINY_MODEL, "num_hidden_layers": 2}
    shallow = f"model={json.dumps(model)}"
    arms = {
        "dense": ["method={name: full}"],
        "est": [EST],
        "shallow": ["method={name: full}", shallow],
    }
    runs = [
        TimedRun(name, str(run), (f"run_dir={folder}/{name}", *COMMON, *layout, *arms[name]))
        for name in RUNS
    ]
    with (folder / "log").open("w") as log:
        found = measure_runs(runs, processes=2, limit_s=0.0, log=log)
    assert list(found) == ["est", "shallow"], (folder / "log").read_text()
    dense = ("dense", "full", 0, 6)
    phases = [("est", "small", 0, 2), ("est", "narrow", 1, 2), ("est", "full", 2, 2)]
    check_times(found["est"], [dense, *phases])
    check_times(found["shallow"], [dense, ("shallow", "full", 0, 6)])
    assert found["est"].num_rounds == FEWEST == len(found["est"].run_ratios("est"))
    assert {p.name for p in folder.iterdir()} == {"log"}  # no run directory


def test_several_runs_take_turns_in_one_group_of_processes(synthetic_run, tmp_path):
    check_runs(synthetic_run, ["parallel.pipe=2", "parallel.zero=1"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_several_runs_take_turns_under_every_zero(zero, synthetic_run, tmp_path):
    check_runs(synthetic_run, ["parallel.pipe=1", f"parallel.zero={zero}"], tmp_path)
