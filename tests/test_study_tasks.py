"""Tasks that a study asks every finished run: `evaluate.tasks`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from scipy import stats

from conftest import est_ds
from est_ds.config.run_file import load_run
from est_ds.cost.flops import Flops
from est_ds.errors import UserError
from est_ds.run.scores import Figure, TaskScore
from est_ds.score.evaluate import Wish as Asked
from est_ds.score.evaluate import check_tasks, evaluate_run
from est_ds.studies.answers import answer
from est_ds.studies.compare import Wish, open_study
from est_ds.studies.downstream import downstream, downstream_text
from est_ds.studies.page import render
from est_ds.studies.results import read_results
from est_ds.studies.runs import StudyRun, key_of
from est_ds.studies.snapshot import Snapshot
from est_ds.studies.statistics import rank_correlation
from est_ds.studies.text import answers_json, answers_text
from made_studies import DENSE, LAYERS, result_of
from pages import Page

TASKS = ("next_word", "cloze")


def test_a_finished_run_is_asked_before_its_checkpoint_goes(write_study, trained, tmp_path):
    directory = Path(shutil.copytree(trained, tmp_path / "run"))
    config = load_run(directory)
    found, _ = evaluate_run(config, Asked("latest", TASKS, limit=20))
    run = StudyRun("dense", 0, (), config, Flops(1.0, 1.0), key_of(config), "dense/seed_0")
    session = open_study(str(write_study(evaluate={"tasks": TASKS, "limit": 20})), Wish())
    session.results.begin(session.header)
    session._done(run, True)
    result = read_results(session.results.file).runs[run.key]
    assert result.tasks == found.tasks and set(result.tasks) == set(TASKS)
    assert not (directory / "checkpoints").exists()


@pytest.mark.slow
def test_a_study_that_is_trained_scores_its_runs(write_study, tmp_path):
    asked = {"tasks": ["next_word"], "limit": 20}
    shape = {"seeds": [0], "intervals": False, "budgets": ["tokens"], "arms": {"dense": DENSE}}
    done = est_ds("compare", write_study(evaluate=asked, **shape))
    assert done.returncode == 0, done.stdout + done.stderr
    [result] = read_results(tmp_path / "study" / "results.jsonl").runs.values()
    right = result.tasks["next_word"].metrics["acc"].value
    assert 0 <= right <= 1 and f"{right:.4f}" in done.stdout.split("Tasks")[1]
    assert not (tmp_path / "study" / "dense" / "seed_0" / "checkpoints").exists()


def scored(right: float, limit: int | None = None) -> dict[str, TaskScore]:
    figure = Figure(value=right, error=0.01)
    settings = {"limit": limit}
    return {"cloze": TaskScore(by="est_ds", metrics={"acc": figure}, examples=9, chance=0.2)} | {
        "next_word": TaskScore(
            by="est_ds", metrics={"acc": figure}, examples=9, chance=0.2, settings=settings
        )
    }


def test_answers_show_mean_and_spread_of_every_arm(write_study):
    arms = {"dense": DENSE, "layers": {"method": LAYERS}}
    file = write_study(arms=arms, budgets=["tokens"], evaluate={"tasks": ["next_word"]})
    session = open_study(str(file), Wish())
    session.results.begin(session.header)
    scores = {"dense": [0.2, 0.3, 0.4], "layers": [0.5, 0.5, 0.25]}
    for run in session.wanted().runs:
        limit = 5 if scores[run.arm][run.seed] == 0.25 else None
        tasks = scored(scores[run.arm][run.seed], limit)
        session.results.add(result_of(run, 3.0).model_copy(update={"tasks": tasks}))
    results = read_results(session.results.file)
    answers = answer(session.runs, session.wanted(), results)
    dense, layers = (arm.tasks["next_word"] for arm in answers.arms)
    assert (dense.mean.mean, dense.spread, dense.chance) == pytest.approx((0.3, 0.1, 0.2))
    assert layers.scores == {0: 0.5, 1: 0.5}  # not the one that was asked on other places
    assert any("1 runs were done before" in warning for warning in answers.warnings)
    assert "cloze" not in answers.arms[0].tasks
    text = answers_text(session.runs, answers)
    assert "0.3000 +- 0.1000" in text and "0.5000 +- 0.0000" in text
    document = json.loads(answers_json(session.runs, answers, results))
    told = document["arms"]["dense"]["tasks"]["next_word"]
    assert told["scores"] == {"0": 0.2, "1": 0.3, "2": 0.4} and told["spread"] == dense.spread
    assert "<h2>Tasks</h2>" in (page := render(Snapshot(session.runs, answers, results)))
    assert "0.3000 +- 0.1000" in page


# By arm the losses and scores of three seeds; the order of the means is 1 2 3 4 5, of the scores
# from above 2 1 3 4 5: by hand the correlation is -(1 - 6 (1 + 1) / (5 (25 - 1))).
STAND = {
    "dense": ([2.9, 3.0, 3.1], [0.40, 0.41, 0.42]),
    "a": ([3.1, 3.2, 3.3], [0.45, 0.45, 0.45]),
    "b": ([3.3, 3.4, 3.5], [0.37, 0.38, 0.36]),
    "c": ([3.5, 3.6, 3.7], [0.33, 0.33, 0.33]),
    "d": ([3.8, 3.8, 3.8], [0.30, 0.31, 0.29]),
}


def test_losses_stand_against_scores_with_their_rank_correlation(write_study):
    drops = {n: {"method": {"name": "layer_drop", "drop": p}} for n, p in zip("abcd", (1, 2, 3, 4))}
    for arm in drops.values():
        arm["method"]["drop"] /= 10
    changes = {"budgets": ["tokens"], "evaluate": {"tasks": ["next_word"]}}
    file = write_study(arms={"dense": DENSE, **drops}, dense_curve=[0.5, 1.0], **changes)
    session = open_study(str(file), Wish())
    session.results.begin(session.header)
    for run in session.wanted().runs:
        losses, scores = STAND[run.arm]
        shorter = run.arm == "dense" and run.steps == 4
        result = result_of(run, losses[run.seed] + shorter)
        tasks = scored(scores[run.seed] - 0.1 * shorter)
        session.results.add(result.model_copy(update={"tasks": tasks}))
    results = read_results(session.results.file)
    answers = answer(session.runs, session.wanted(), results)
    [(task, found)] = downstream(answers).items()
    assert (task, [p.arm for p in found.places]) == ("next_word", list(STAND))
    assert found.places[0].spreads == pytest.approx((0.1, 0.01))
    assert found.correlation.value == pytest.approx(-0.9)
    half = 1.959964 * math.sqrt((1 + 0.9**2 / 2) / 2)
    ends = [math.tanh(math.atanh(-0.9) + sign * half) for sign in (-1, 1)]
    assert [found.correlation.low, found.correlation.high] == pytest.approx(ends)
    # As far apart are the ranks of 5 of the 120 orders, and as many the other way round.
    assert found.correlation.p == pytest.approx(10 / 120)
    said = downstream_text(task, found)
    assert "rank correlation of 5 arms is -0.90 [" in said and "p 0.083" in said
    assert said in " ".join(answers_text(session.runs, answers).split())
    document = json.loads(answers_json(session.runs, answers, results))["downstream"]["next_word"]
    assert document["said"] == said and document["correlation"]["value"] == pytest.approx(-0.9)
    page = Page(render(Snapshot(session.runs, answers, results)))
    assert "Held-out loss against tasks" in page.headings and said in page.text
    plot = page.plot("downstream")
    seeds, mean = plot.of("b")
    assert (seeds["x"], seeds["y"]) == STAND["b"] and mean["x"] == [pytest.approx(3.4)]
    assert mean["error_x"]["array"] + mean["error_y"]["array"] == pytest.approx([0.1, 0.01])
    [shorter] = plot.of("dense, other budgets")
    assert sorted(shorter["x"]) == pytest.approx([3.9, 4.0, 4.1]) and len(shorter["y"]) == 3


def test_ranks_that_agree_throughout_and_too_few_have_no_interval():
    up = rank_correlation([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.5, 0.9])
    assert (up.value, up.low, up.high) == (pytest.approx(1.0), None, None)
    assert up.p == pytest.approx(2 / 24)
    assert rank_correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) is None
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [0.5] * 4) is None
    assert not up.is_least  # all permutations were tried
    least = rank_correlation(range(10), range(10))
    assert least.is_least and least.p == pytest.approx(2e-4)
    tied = rank_correlation([1, 2, 2, 3, 9, 5, 0, 7, 8], [2, 1, 4, 4, 5, 5, 6, 0, 9])
    assert tied.value == pytest.approx(
        stats.spearmanr([1, 2, 2, 3, 9, 5, 0, 7, 8], [2, 1, 4, 4, 5, 5, 6, 0, 9]).statistic
    )
    assert tied.low < tied.value < tied.high and 0 < tied.p < 1


def test_results_without_tasks_are_read_and_shown_as_before(write_study):
    session = open_study(str(write_study(budgets=["tokens"])), Wish())
    session.results.begin(session.header)
    for run in session.wanted().runs:
        session.results.add(result_of(run, 3.0))
    file = session.results.file
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines[1:]:
        assert line["run"].pop("tasks") == {}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = read_results(file)
    answers = answer(session.runs, session.wanted(), results)
    assert len(results.runs) == 6 and not any(arm.tasks for arm in answers.arms)
    assert "Tasks" not in answers_text(session.runs, answers)
    assert not any("evaluate" in warning for warning in answers.warnings)


def test_models_that_cannot_be_asked_are_refused_before_anything_is_trained():
    check_tasks(("cloze",), "AutoModelForMaskedLM", "evaluate.tasks")
    with pytest.raises(UserError, match="evaluate.tasks=next_word asks a model that predicts"):
        check_tasks(TASKS, "AutoModelForMaskedLM", "evaluate.tasks")
