"""The picture of a run that is killed and moved: what is drawn, and when it says no."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from conftest import run_command
from est_ds.run.metrics import FILE

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def moved():
    """The script, as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    import moved

    sys.path.remove(str(BENCHMARKS))
    return moved


@pytest.fixture
def twin(trained, tmp_path):
    """The finished run again, with changed fields in a step."""

    def twin(step: int, **changes) -> Path:
        lines = [json.loads(line) for line in (trained / FILE).read_text().splitlines()]
        for line in lines:
            if line["step"] == step and "loss" in line:
                line |= {name: change(line[name]) for name, change in changes.items()}
        (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path

    return twin


def test_kills_are_drawn_by_the_seed_and_starts_go_through_the_layouts(moved):
    kills = moved.drawn_kills(10, 300, 0)
    assert kills == moved.drawn_kills(10, 300, 0) != moved.drawn_kills(10, 300, 1)
    assert kills == sorted(set(kills)) and len(kills) == 10 and 0 < kills[0] < kills[-1] < 300
    starts = [moved.layout_of(start, 11) for start in range(11)]
    one, two, three = moved.LAYOUTS
    assert starts == [one] * 4 + [two] * 4 + [three] * 3
    assert [moved.layout_of(start, 3) for start in range(3)] == [one, two, three]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 0),
        ({"loss": lambda loss: loss * (1 + 0.9e-4)}, 0),
        ({"loss": lambda loss: loss * (1 - 1.1e-4)}, 1),
        ({"plan_digest": lambda digest: digest[::-1]}, 1),
        ({"data_digest": lambda digest: digest[::-1]}, 1),
    ],
)
def test_a_step_that_differs_is_the_exit_code(changes, code, moved, trained, twin, capsys):
    found = moved.compared(trained, twin(7, **changes))
    assert moved.told(found, 1e-4, 1.0) == code
    said = capsys.readouterr().out
    assert "20 steps, loss" in said
    if "loss" in changes:
        assert "at step 7; 0 steps with another plan or batch" in said
    elif changes:
        assert "relative difference 0.0e+00" in said and "1 steps with another" in said


def test_the_picture_has_both_losses_and_every_kill(moved, trained, twin, tmp_path):
    layouts = {"loss": lambda loss: loss * 1.001, "layout": lambda layout: {**layout, "zero": 3}}
    found = moved.compared(trained, twin(7, **layouts))
    assert [(p.name, p.from_step, p.until_step) for p in found.layouts] == [
        (name, begin, end) for name, begin, end in zip(moved.LAYOUTS, (0, 7, 8), (7, 8, 20))
    ]
    figure = moved.moved_figure(found, [3, 11], 1e-4)
    above, below = figure.axes
    drawn = [line.get_ydata().tolist() for line in above.lines[:2]]
    assert drawn == [found.losses.tolist(), found.moved.tolist()]
    for axes in (above, below):
        kills = [x for line in axes.lines if line.get_color() == moved.style.RED
                 for x in {*line.get_xdata()}]  # fmt: skip
        assert kills == [3, 11]
    assert below.lines[0].get_xdata().tolist() == [8]  # the only step that differs, done
    assert below.lines[0].get_ydata().tolist() == [pytest.approx(1e-3)]
    assert moved.style.write_figure(figure, tmp_path / "moved.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_run_killed_twice_and_moved_twice_has_the_losses_of_one_that_was_not(tmp_path):
    arguments = ("--steps", "30", "--kills", "2", "--out", tmp_path / "moved.svg")
    done = run_command(sys.executable, BENCHMARKS / "moved.py", *arguments, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    starts = [line for line in done.stdout.splitlines() if line.startswith("start ")]
    assert [line.split(":")[1].split(",")[0].strip() for line in starts] == [
        "pipeline 2 x 2", "ZeRO 3 x 2", "one process",
    ]  # fmt: skip
    assert starts[0].endswith("killed at step 13") and starts[-1].endswith("went to its end")
    assert "0 steps with another plan or batch" in done.stdout
    assert (tmp_path / "moved.svg").read_text().count("SIGKILL") >= 1
