"""The page of a study says what its results say, done or not."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from statistics import fmean

import pytest

from a_study import EFFECTS, RATIOS, answers_of, make_study, measure, train
from est_ds.errors import UserError
from est_ds.report.interactive import new_figure, switch
from est_ds.studies.boundary_map import boundary_map
from est_ds.studies.page import write_page
from est_ds.studies.picture import study_figure, write_study_figure
from est_ds.studies.snapshot import Snapshot
from est_ds.studies.text import interval_text
from pages import Page

TUNING = "Tuning of optimizer.lr"
ARMS = ["raptr", "late", "hot"]


def page_of(study) -> Page:
    file = write_page(study.runs, answers_of(study), study.results)
    assert file == study.runs.file.folder / "study.html"
    assert not list(file.parent.glob(".*partial"))
    return Page(file.read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    study = make_study(tmp_path_factory.mktemp("a_study"))
    measure(study)
    train(study)
    return study


@pytest.fixture(scope="module")
def page(done):
    return page_of(done)


def own_runs(study, arm):
    """Results of an arm's whole runs at the best learning rate, by seed."""
    found = [r for r in study.results.runs.values() if r.arm == arm and r.steps == 400]
    return {r.seed: r for r in found if r.values["optimizer.lr"] == "0.002"}


def test_differences_of_every_arm_stand_in_table_and_figure(done, page):
    answers = answers_of(done)
    heads, rows = page.rows()["arm"], page.rows()
    plot = page.plot("differences")
    for arm in answers.arms[1:]:
        for budget, words in {"tokens": "tokens", "seconds": "seconds", "flops": "FLOPs"}.items():
            steps = arm.budgets[budget].steps
            dense = {
                r.seed: r.loss
                for r in done.results.runs.values()
                if (r.arm, r.steps, r.values["optimizer.lr"]) == ("dense", steps, "0.002")
            }
            mean = fmean(r.loss - dense[s] for s, r in own_runs(done, arm.name).items())
            cell = rows[arm.name][heads.index(f"difference at equal {words}")]
            assert cell == interval_text(arm.budgets[budget].difference.interval)
            assert cell.startswith(f"{mean:+.4f} [")
            drawn = plot.button(f"equal {words}")[0]["x"][2 * ARMS.index(arm.name) + 1]
            assert drawn == [pytest.approx(mean)]
    # At first the budget that decides is shown.
    assert plot.traces[1]["x"] == plot.button("equal FLOPs")[0]["x"][1]
    verdicts = [rows[arm][heads.index("verdict")] for arm in ("raptr", "late")]
    assert verdicts == ["costs", "pays"] and "At equal FLOPs late pays (-0." in page.text
    assert rows["dense"][heads.index("verdict")] == "baseline"


def test_the_fit_is_drawn_between_the_costs_that_were_trained(done, page):
    [fit] = page.plot("ends").of("dense, fit")
    dense = [r.flops for r in done.results.runs.values() if r.arm == "dense"]
    assert min(fit["x"]) == pytest.approx(min(dense)) and max(fit["x"]) == pytest.approx(max(dense))
    # What it was made of: 3 + .8 (C / 3e12)^-.3, and offsets of seeds that come to under .02.
    for flops, loss in zip(fit["x"], fit["y"]):
        assert loss == pytest.approx(3.0 + 0.8 * (flops / 3e12) ** -0.3, abs=0.02)


def test_end_points_stand_at_their_costs(done, page):
    plot = page.plot("ends")
    for arm in ARMS:
        where = [i for i, t in enumerate(plot.traces) if t.get("name") == arm and "error_y" in t]
        [flops], [tokens], [seconds] = (
            plot.button(cost)[0]["x"][where[0]] for cost in ("FLOPs", "tokens", "seconds")
        )
        assert flops == own_runs(done, arm)[0].flops and tokens == 400 * 8 * 64
        assert seconds == pytest.approx(400 * 0.5 * RATIOS[arm])
        [loss] = plot.traces[where[0]]["y"]
        assert loss == pytest.approx(fmean(r.loss for r in own_runs(done, arm).values()))


def test_curves_know_that_phases_differ_in_their_cost(done, page):
    plot = page.plot("curves")
    [mean] = [t for t in plot.of("raptr") if t["showlegend"]]
    assert len(plot.of("raptr")) == 1 + 3
    total = own_runs(done, "raptr")[0].flops
    ratio = total / own_runs(done, "dense")[0].flops
    # The second half is the full model: a half of dense's FLOPs. An evaluation every 20 steps.
    assert mean["x"][9] / total == pytest.approx(1 - 0.5 / ratio)
    assert mean["x"][-1] == pytest.approx(total)
    assert plot.button("tokens")[0]["x"][plot.traces.index(mean)][9] == 200 * 8 * 64


def test_tuned_values_and_gains_are_drawn(done, page):
    plot = page.plot("tuning_0")
    assert [t["name"] for t in plot.traces] == list(EFFECTS)
    for trace in plot.traces:
        assert trace["x"] == [1e-3, 2e-3, 4e-3] and min(trace["y"]) == trace["y"][1]
        assert trace["marker"]["size"][1] > trace["marker"]["size"][0]
    answers, plot = answers_of(done), page.plot("gains")
    for arm in answers.arms[1:]:
        drawn = [t["x"] for t in plot.of(arm.name)]
        assert drawn == [[arm.gain.interval.mean], [arm.gain_seconds.interval.mean]]


def test_boundaries_are_drawn_at_their_steps(page):
    plot = page.plot("boundaries")
    zooms = [button["label"] for button in plot.layout["updatemenus"][0]["buttons"]]
    assert [z.split(":")[0] for z in zooms] == ["raptr", "late", "whole runs"]
    # By the fixture: subnetworks lie .1 above the full model before, and on it after.
    full, subnetworks = (t["y"] for t in plot.of("raptr") if t["mode"] == "lines+markers")
    assert subnetworks[0] - full[0] == pytest.approx(0.1) and subnetworks[1] == full[1]
    low, high = plot.layout["xaxis"]["range"]
    assert low < 200 < high and high - low < 100


@pytest.mark.parametrize(
    ("names", "kind"), [(("a", "b"), "buttons"), (("a" * 30, "b" * 30), "dropdown")]
)
def test_long_names_are_a_list_where_short_ones_are_buttons(names, kind):
    figure = new_figure("")
    switch(figure, {name: ({}, {}) for name in names})
    [menu] = figure.layout.updatemenus
    assert menu.type == kind and [button.label for button in menu.buttons] == list(names)


def test_arms_that_differ_in_their_boundaries_stand_on_a_map(tmp_path):
    def ending(first, second, kept):
        phases = [
            {"until": first, "layers": kept},
            {"until": second, "columns": kept},
            {"until": 1.0},
        ]
        return {"method": {"name": "est", "phases": phases}}

    ends = [(0.1, 0.2), (0.1, 0.5), (0.25, 0.5), (0.5, 0.75)]
    arms = {f"a{i}": ending(*pair, 0.5) for i, pair in enumerate(ends)}
    study = make_study(tmp_path, arms={"dense": {}, "more": ending(0.1, 0.2, 0.75), **arms})
    train(study)
    snapshot = Snapshot(study.runs, answers_of(study), study.results)
    figure = boundary_map(snapshot)
    [trace] = figure.data  # one method alone has enough arms: no buttons
    assert not figure.layout.updatemenus
    assert list(zip(trace.x, trace.y)) == [(f"{a:g}", f"{b:g}") for a, b in ends]
    of = {
        arm.name: arm.budgets["flops"].difference.interval.mean for arm in snapshot.answers.arms[1:]
    }
    assert [-c for c in trace.marker.color] == pytest.approx([of[name] for name in arms])
    assert [t.partition("<br>")[0] for t in trace.text] == [f"{of[name]:+.3f}" for name in arms]
    few = make_study(
        tmp_path / "few", arms={"dense": {}, "a0": arms["a0"], "more": ending(0.1, 0.2, 0.75)}
    )
    train(few)
    assert boundary_map(Snapshot(few.runs, answers_of(few), few.results)) is None


def test_page_has_runs_study_file_and_versions(done, page):
    assert page.headings[-3:] == ["Runs", "Study file", "Versions and devices"]
    body = list(page.tree.iter("table"))[1].iter("tr")
    assert len(list(body)) == 1 + len(done.results.runs)
    assert done.file.read_text().strip() in "".join(page.tree.find("body/pre").itertext())
    assert page.rows(2)["torch"] == ["2.13.0+cpu"] and page.rows(2)["devices"] == ["cpu"]


@pytest.mark.parametrize(
    ("finished", "figures"),
    [
        (0, []),
        (1, [TUNING]),  # the grid takes 12
        (12, ["End points", "Paired differences", "Held-out loss while training", TUNING]),
    ],
)
def test_page_of_a_study_that_is_partly_done(tmp_path, finished, figures):
    study = make_study(tmp_path)
    train(study, finished)
    page = page_of(study)
    assert f" {finished} of " in page.text and page.rows().keys() == {"arm", "dense", *ARMS}
    assert page.headings[:-3] == [*figures, *["Phase boundaries"] * (finished == 12)]
    assert ("step times were not measured" in page.text) == (finished == 12)
    assert {row[-5] for arm, row in page.rows().items() if arm in ARMS} == {"-"}


def test_page_of_a_pilot_without_a_curve(tmp_path):
    study = make_study(tmp_path, seeds=[4], intervals=False, dense_curve=[], tune={})
    train(study)
    page = page_of(study)
    assert "raptr is at +0.0" in page.text and "one seed: no interval" in page.text
    assert not {"Gain", TUNING} & set(page.headings)
    assert "no line is fitted" in page.text and not page.plot("ends").of("dense, fit")


def test_runs_that_diverged_are_said_and_not_drawn(tmp_path):
    study = make_study(tmp_path, tune={}, dense_curve=[])
    train(study)
    [lost] = [r for r in study.results.runs.values() if (r.arm, r.seed) == ("raptr", 1)]
    changes = {"loss": None, "curve": lost.curve[:3], "boundaries": []}
    study.results.add(lost.model_copy(update=changes))
    page = page_of(study)
    assert "raptr costs (1 diverged)" in page.text
    seeds = page.plot("ends").of("raptr")[0]
    assert seeds["text"] == ["seed 0", "seed 2"]
    assert {len(t["y"]) for t in page.plot("curves").of("raptr")} == {20, 3}


def test_picture_shows_the_differences_and_the_curve(done, tmp_path):
    answers = answers_of(done)
    snapshot = Snapshot(done.runs, answers, done.results)
    ends, differences = study_figure(snapshot).axes
    names = [label.get_text() for label in differences.get_yticklabels()]
    compared = {a.name: a.budgets["flops"] for a in answers.arms[1:]}
    means = [compared[name].difference.interval.mean for name in names]
    assert sorted(names) == sorted(name for name, c in compared.items() if c.difference)
    assert means == sorted(means)
    drawn = [line.get_xydata().tolist() for line in differences.get_lines()]
    for row, name in enumerate(names):
        interval = compared[name].difference.interval
        assert [[interval.mean, row]] in drawn
        assert [[interval.low, row], [interval.high, row]] in drawn
    curve = ends.get_lines()[0].get_xydata()
    usual = done.runs.first.flops.model
    costs = sorted({r.flops / usual for r in answers.dense})
    assert [x for x, _ in curve] == pytest.approx(costs)
    for cost, loss in curve:
        of_cost = [r.loss for r in answers.dense if r.flops / usual == pytest.approx(cost)]
        assert loss == pytest.approx(fmean(of_cost))
    file = write_study_figure(snapshot, tmp_path / "a" / "study.png")
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="'.xyz' is no picture format"):
        write_study_figure(snapshot, tmp_path / "study.xyz")


def test_names_in_the_picture_lie_on_nothing(done):
    """Twenty arms that come to nearly the same."""
    answers = answers_of(done)
    base, first = answers.arms[:2]
    arms = [
        replace(
            first,
            name=f"crowded_{i:02d}",
            flops_ratio=first.flops_ratio + 0.004 * (i % 3),
            losses={seed: loss + 0.001 * i for seed, loss in first.losses.items()},
        )
        for i in range(20)
    ]
    crowded = replace(answers, arms=(base, *arms))
    figure = study_figure(Snapshot(done.runs, crowded, done.results))
    figure.draw_without_rendering()
    ends = figure.axes[0]
    names = [text for text in ends.texts if text.get_text()]
    assert [text.get_text() for text in names] == [arm.name for arm in arms]
    boxes = [text.get_window_extent().shrunk(0.98, 0.9) for text in names]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    points = [ends.transData.transform(line.get_xydata()[0]) for line in ends.get_lines()[1:]]
    assert not [box for box in boxes for point in points if box.contains(*point)]
    frame = ends.get_window_extent()
    assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)


def test_page_that_cannot_be_written_is_one_clear_error(tmp_path):
    study = make_study(tmp_path)
    (study.runs.file.folder / ".study.html.partial").mkdir()
    with pytest.raises(UserError, match="study.html' cannot be written.*study_dir"):
        write_page(study.runs, answers_of(study), study.results)
