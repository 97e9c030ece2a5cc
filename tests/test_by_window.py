"""What held-out losses by window say of a difference between arms."""

from __future__ import annotations

import json

import numpy as np
import pytest

from est_ds.errors import UserError
from est_ds.run.windows import WindowLosses, windows_file, write_windows
from est_ds.studies.answers import answer
from est_ds.studies.page import render
from est_ds.studies.snapshot import Snapshot
from est_ds.studies.statistics import t_interval
from est_ds.studies.text import answers_json, answers_text, interval_text
from made_studies import answered
from pages import Page

COUNT = 200
TARGETS = np.random.default_rng(0).integers(1, 64, COUNT)


def held(losses, targets=TARGETS, first=0) -> WindowLosses:
    return WindowLosses(
        np.asarray(losses, dtype=np.float64), targets, first + np.arange(len(targets))
    )


def made(file, by_corpus, left_out=()):
    """A study whose runs have these windows, and the losses that follow from them."""
    of = {}

    def loss_of(run) -> float:
        corpora = by_corpus(run)
        of[run.key] = (run, corpora)
        return float(np.mean([w.mean for w in corpora.values()]))

    runs, wanted, results, _ = answered(file, loss_of)
    for key, (run, corpora) in of.items():
        if (run.arm, run.seed) not in left_out:
            write_windows(file.parent, 1, corpora)
            results.windows(key).parent.mkdir(exist_ok=True)
            windows_file(file.parent, 1).replace(results.windows(key))
    return runs, results, answer(runs, wanted, results)


def centred(seed: int, noise: float) -> np.ndarray:
    """Of every window; 0 over all targets."""
    own = np.random.default_rng(seed).normal(0.0, noise, COUNT)
    return own - (own * TARGETS).sum() / TARGETS.sum()


def noisy(difference: float, noise: float):
    """Windows of one corpus: those of an arm differ, and each by some noise."""

    def of(run):
        common = np.random.default_rng(7).normal(3.0, 0.5, COUNT)
        own = centred(run.seed, noise)
        return {
            "valid": held(common + 0.02 * run.seed + (run.arm == "layers") * (difference + own))
        }

    return of


def warned(answers, text: str) -> list[str]:
    return [warning for warning in answers.warnings if text in warning]


def test_mean_over_windows_is_the_difference_of_the_losses_of_seeds_that_have_them(write_study):
    left_out = {("layers", 2)}
    runs, results, answers = made(write_study(), noisy(-0.1, 0.05), left_out)
    compared = answers.arms[1].budgets["tokens"]
    by_seed = {(r.arm, r.seed): r.loss for r in results.runs.values() if r.steps == 8}
    expected = np.mean([by_seed["layers", s] - by_seed["dense", s] for s in (0, 1)])
    assert compared.windows.seeds == (0, 1) and compared.difference.pairs == 3
    assert compared.windows.interval.mean == pytest.approx(expected, abs=1e-12)
    # Three of the arm, and three of the baseline at each of the two budgets.
    [missing] = warned(answers, "losses by window")
    assert (
        missing.startswith("1 of the 9 runs compared")
        and str(results.windows("").parent) in missing
    )
    assert "(seed 0, 1)" in Page(render(Snapshot(runs, answers, results))).rows()["layers"][4]


def test_a_pilot_has_an_interval_over_windows_in_json_and_on_the_page(write_study):
    file = write_study(seeds=[3], intervals=False, budgets=["tokens"])
    runs, results, answers = made(file, noisy(-0.1, 0.05))
    interval = answers.arms[1].budgets["tokens"].windows.interval
    # By Student's t: what each window is off the mean, in proportion to its targets.
    by_t = t_interval(COUNT * TARGETS / TARGETS.sum() * centred(3, 0.05) - 0.1)
    assert (interval.low, interval.high) == pytest.approx((by_t.low, by_t.high), abs=1e-3)
    document = json.loads(answers_json(runs, answers, results))
    found = document["arms"]["layers"]["budgets"]["tokens"]["windows"]
    assert found["interval"] == pytest.approx(vars(interval))
    assert (found["seeds"], found["count"]) == ([3], COUNT)
    page = Page(render(Snapshot(runs, answers, results)))
    cell = page.rows()["layers"][page.rows()["arm"].index("over windows")]
    assert cell == f"+-{(interval.high - interval.low) / 2:.4f}"
    said = f"over {COUNT} held-out windows: {interval_text(interval)}"
    assert said in page.plot("differences").traces[1]["text"][0]
    assert "Over windows" in page.text and "Over windows" in answers_text(runs, answers)
    assert not warned(answers, "windows")


def test_corpora_are_not_drawn_against_each_other(write_study):
    """Two of different size, each with one difference throughout: other windows change nothing."""

    def of(run):
        more = run.arm == "layers"
        return {
            "near": held(2.0 + 1.0 * more + np.arange(COUNT)),
            "far": held(5.0 + 3.0 * more + np.arange(9), np.full(9, 64), 40),
        }

    _, _, answers = made(write_study(budgets=["tokens"]), of)
    interval = answers.arms[1].budgets["tokens"].windows.interval
    assert vars(interval) == pytest.approx({"mean": 2.0, "low": 2.0, "high": 2.0})


@pytest.mark.parametrize(
    ("seeds", "difference", "noise", "turns"),
    [
        ([0], 0.01, 0.5, True),  # one seed, and nothing else has an interval
        ([0], 0.5, 0.5, False),
        ([0, 1, 2], 0.01, 0.5, False),  # seeds leave as much open
    ],
)
def test_sign_that_other_text_could_turn_is_told(write_study, seeds, difference, noise, turns):
    pilot = {"intervals": False} if len(seeds) == 1 else {}
    file = write_study(seeds=seeds, budgets=["tokens"], **pilot)
    windows = noisy(difference, noise)

    def of(run):
        found = windows(run)["valid"]
        apart = (0.0, -0.3, 0.3)[run.seed] * (run.arm == "layers")
        return {"valid": held(found.losses + apart)}

    _, _, answers = made(file, of)
    said = warned(answers, "at equal tokens other held-out text could turn the sign")
    assert bool(said) == turns
    assert not turns or "of layers; raise evaluate.sequences" in said[0]


def test_windows_wider_than_seeds_are_told_where_the_sign_hangs_on_them(write_study):
    """Seeds agree to a hundredth of what other windows could make of the difference."""

    def of(run):
        more = 0.01 + centred(1, 0.5) + (0.0, 1e-4, -1e-4)[run.seed]
        return {"valid": held(3.0 + 0.1 * run.seed + (run.arm == "layers") * more)}

    _, _, answers = made(write_study(budgets=["tokens"]), of)
    assert answers.arms[1].budgets["tokens"].verdict == "costs"
    assert warned(answers, "could turn the sign of the difference of layers")


def test_runs_on_other_windows_are_not_compared_by_them(write_study):
    def of(run):
        return {"valid": held(np.full(COUNT, 3.0 + 0.1 * run.seed), first=run.arm == "layers")}

    _, _, answers = made(write_study(), of)
    assert answers.arms[1].budgets["tokens"].windows is None


def test_torn_file_of_windows_is_one_clear_error(write_study):
    file = write_study()
    runs, results, _ = made(file, noisy(0.1, 0.1))
    torn = results.windows(runs.run("layers", 0, ()).key)
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{torn.name}: no losses by window.*restore the file"):
        answered(file, lambda run: 3.0)
