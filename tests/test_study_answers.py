"""Which runs a study has, and what it says when they are done."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from est_ds.studies.answers import answer
from est_ds.studies.runs import Chooser, Runs, StudyRun, wanted_runs
from est_ds.studies.study_file import load_study
from est_ds.studies.text import answers_text, p_text
from est_ds.studies.times import known_ratios
from made_studies import DENSE, HALF_LAYERS, LAYERS, answered, dense_loss, result_of, times_of

# What a study trains.


def test_arms_are_compared_with_the_baseline_at_equal_tokens_and_at_equal_flops(write_study):
    file = write_study(dense_curve=[0.5, 1.0, 1.5])
    runs = Runs(load_study(file))
    wanted = wanted_runs(runs, Chooser({}, {}))
    ratio = runs.run("layers", 0, ()).flops.model / runs.run("dense", 0, ()).flops.model
    assert wanted.matched["layers"] == {"tokens": 8, "flops": round(8 * ratio)}
    assert 0.5 < ratio < 1.0
    expected = {("layers", 8), *(("dense", n) for n in (4, 8, 12, round(8 * ratio)))}
    for seed in (0, 1, 2):
        assert {(r.arm, r.steps) for r in wanted.runs if r.seed == seed} == expected
    # Each of the baseline's runs ends its own schedule.
    for run in wanted.runs:
        assert run.config.schedule == runs.run("dense", 0, ()).config.schedule


def test_at_equal_tokens_the_baseline_trains_exactly_as_many_steps(write_study):
    """Budgets of FLOPs are rounded to a 200th; a study of 401 steps has none of its own length."""
    arms = {"dense": DENSE, "same": DENSE, "layers": {"method": LAYERS}}
    sizes = {"set": {"steps": 401}, "budgets": ["tokens", "flops"], "dense_curve": [0.5, 1.0]}
    runs, wanted, results, answers = answered(write_study(arms=arms, **sizes), dense_loss)
    assert wanted.matched["same"] == {"tokens": 401, "flops": 401}
    assert wanted.matched["layers"]["tokens"] == 401
    assert wanted.matched["layers"]["flops"] % 2 == 0
    assert {r.steps for r in wanted.runs if r.arm == "layers"} == {401}
    assert 400 not in {r.steps for r in wanted.runs}
    [same] = [arm for arm in answers.arms if arm.name == "same"]
    assert {compared.verdict for compared in same.budgets.values()} == {"no difference"}


def test_a_grid_is_tried_on_the_first_seed_and_its_best_is_that_of_the_others(write_study):
    file = write_study(tune={"optimizer.lr": [1e-3, 2e-3, 4e-3]})
    best = {"dense": "0.002", "layers": "0.004"}

    def loss(run: StudyRun) -> float:
        return 1.0 + (dict(run.values)["optimizer.lr"] != best[run.arm])

    runs, wanted, results, answers = answered(file, loss)
    assert wanted.chosen == {arm: (("optimizer.lr", value),) for arm, value in best.items()}
    tried = {(r.arm, r.seed, r.values["optimizer.lr"]) for r in results.runs.values()}
    grid = {(arm, 0, lr) for arm in best for lr in ("0.001", "0.002", "0.004")}
    assert tried == grid | {(arm, seed, best[arm]) for arm in best for seed in (1, 2)}
    edges = [warning for warning in answers.warnings if "edge" in warning]
    assert len(edges) == 1 and "arm layers: the best optimizer.lr=0.004" in edges[0]
    assert "tuned" not in " ".join(set(answers.warnings) - set(edges))


def test_an_arm_that_is_far_behind_on_the_first_seed_trains_no_other(write_study):
    arms = {"near": {"method": HALF_LAYERS}, "far": {"method": LAYERS}}
    file = write_study(arms={"dense": DENSE, **arms}, budgets=["tokens", "flops"], screen=0.3)

    def loss_of(run):
        worse = {"near": 0.1, "far": 0.5}.get(run.arm, 0.0)
        return dense_loss(run) + worse + 0.01 * run.seed * (run.arm != "dense")

    runs, wanted, results, answers = answered(file, loss_of)
    seeds = {name: {r.seed for r in wanted.runs if r.arm == name} for name in runs.file.arms}
    assert seeds == {"dense": {0, 1, 2}, "near": {0, 1, 2}, "far": {0}}
    far = wanted.matched["far"]["flops"]
    assert {r.seed for r in wanted.runs if (r.arm, r.steps) == ("dense", far)} == {0}
    assert list(wanted.screened) == ["far"]
    of = {arm.name: arm.budgets["flops"] for arm in answers.arms[1:]}
    assert of["far"].verdict is None
    assert "behind on the first seed, more than 0.3" in of["far"].unsure
    assert of["near"].verdict == "costs"
    # It counts as a test: the other one's p value is corrected for two arms.
    assert of["near"].corrected == pytest.approx(2 * of["near"].difference.p)


def test_no_other_seed_is_trained_before_the_first_one_tells(write_study):
    file = write_study(screen=0.3)
    runs = Runs(load_study(file))
    waiting = wanted_runs(runs, Chooser({}, {}))
    assert {r.seed for r in waiting.runs if r.arm != "dense"} == {0}
    counted = wanted_runs(runs, Chooser({}, {}, guess=True))
    assert len({r.seed for r in counted.runs if r.arm != "dense"}) == 3


def test_two_arms_of_one_config_are_one_run(write_study):
    file = write_study(arms={"dense": DENSE, "same": DENSE})
    assert {r.arm for r in wanted_runs(Runs(load_study(file)), Chooser({}, {})).runs} == {"dense"}


def test_seeds_of_weights_data_and_draws_may_be_apart(write_study):
    seeds = {"model": [5, 6], "data": 7, "method": [8, 9]}
    file = load_study(write_study(seeds=seeds)).with_seeds({2, 3})
    configs = [Runs(file).run("layers", seed, ()).config.seeds for seed in file.seeds]
    found = [(s.model, s.data, s.method) for s in configs]
    assert found == [(5, 7, 8), (6, 7, 9), (7, 7, 10), (8, 7, 11)]


def test_seconds_make_budgets_of_step_times(write_study):
    file = write_study(budgets=["seconds"], dense_curve=[0.5, 1.0, 1.5])
    times = times_of(file, {"dense": (1.0, 0.0), "layers": (0.75, 0.0)})
    runs, wanted, results, answers = answered(file, dense_loss, times)
    assert wanted.matched["layers"] == {"seconds": 6}
    arm = answers.arms[1]
    # The arm's loss is that of dense at as many FLOPs; at 0.75 of the time it gains by their ratio.
    assert arm.gain.interval.mean == pytest.approx(1.0, rel=1e-3)
    assert arm.gain_seconds.interval.mean == pytest.approx(arm.flops_ratio / 0.75, rel=1e-3)
    assert any("1.0 processors busy" in warning for warning in answers.warnings)


def test_step_times_of_an_arm_that_has_changed_are_not_its_own(write_study):
    arms = {"dense": DENSE, "same": DENSE, "half": {"method": HALF_LAYERS}}
    file = write_study(budgets=["seconds"], arms=arms)
    times = times_of(file, {"dense": (1.0, 0.0), "same": (1.03, 0.0), "half": (0.6, 0.0)})
    # An arm of the baseline's config has its time, whatever was measured.
    assert known_ratios(Runs(load_study(file)), times) == {"dense": 1.0, "same": 1.0, "half": 0.6}
    arms["half"] = {"method": {**HALF_LAYERS, "drop": 0.75}}
    changed = Runs(load_study(write_study(budgets=["seconds"], arms=arms)))
    assert known_ratios(changed, times) == {"dense": 1.0, "same": 1.0}


def test_step_times_that_spread_give_no_verdict_at_equal_seconds(write_study):
    file = write_study(budgets=["tokens", "seconds"])
    times = times_of(file, {"dense": (1.0, 0.0), "layers": (0.75, 0.46)})
    noise = {0: 0.001, 1: -0.002, 2: 0.0015}
    _, _, _, answers = answered(
        file, lambda run: dense_loss(run) + (1.0 + noise[run.seed]) * (run.arm == "layers"), times
    )
    budgets = answers.arms[1].budgets
    assert (budgets["tokens"].verdict, budgets["seconds"].verdict) == ("costs", None)
    assert any("its step times spread by 46%" in warning for warning in answers.warnings)


def test_a_baseline_that_is_better_after_fewer_steps_is_told(write_study, tmp_path):
    """As of little text that is read often: dense is best after half of its steps."""
    arms = {"dense": DENSE, "half": {"method": HALF_LAYERS}, "better": {"method": LAYERS}}
    file = write_study(arms=arms, budgets=["tokens"], dense_curve=[0.25, 0.5, 0.75, 1.0])
    losses = {"half": 4.2, "better": 3.8, 2: 4.4, 4: 4.0, 6: 4.2, 8: 4.5}

    def loss(run: StudyRun) -> float:
        noise = 0.01 * ((run.seed + len(run.arm)) % 3)
        return losses[run.steps if run.arm == "dense" else run.arm] + noise

    _, _, _, answers = answered(file, loss)
    assert not answers.curves and {arm.gain for arm in answers.arms} == {None}
    told = [w for w in answers.warnings if "better after" in w]
    assert len(told) == 1 and told[0].startswith("dense is better after 4 steps than after 8 ")
    assert told[0].endswith("Better than its best with each seed: better")
    falling = write_study(study_dir=str(tmp_path / "falling"), dense_curve=[0.5, 1.0])
    assert not [w for w in answered(falling, dense_loss)[3].warnings if "better after" in w]


def test_a_baseline_that_its_curve_misses_says_how_far_a_gain_is_off(write_study, tmp_path):
    arms = {"dense": DENSE, "half": {"method": HALF_LAYERS}}
    wanted = {"arms": arms, "seeds": [0], "dense_curve": [0.25, 0.5, 0.75, 1.0], "intervals": False}

    def loss(run: StudyRun) -> float:
        return dense_loss(run) + 0.05 * (run.arm == "dense" and run.steps == 4)

    _, _, _, answers = answered(write_study(**wanted), loss)
    curve = answers.curves[0]
    own = [
        optimize.brentq(lambda cost: curve.loss(cost) - run.loss, run.flops / 9, 9 * run.flops)
        / run.flops
        for run in answers.dense
    ]
    assert len(own) >= 4 and min(own) < 0.98 and max(own) > 1.02
    shown = f"{min(own):.2f} to {max(own):.2f}"
    assert [w for w in answers.warnings if "own runs" in w and f"have gains of {shown}:" in w]
    smooth = write_study(study_dir=str(tmp_path / "smooth"), **wanted)
    assert not [w for w in answered(smooth, dense_loss)[3].warnings if "own runs" in w]


def test_an_arm_of_the_baselines_own_config_makes_no_difference_on_a_busy_machine(write_study):
    file = write_study(
        arms={"dense": DENSE, "same": DENSE}, budgets=["seconds"], dense_curve=[0.5, 0.75, 1.0]
    )
    times = times_of(file, {"dense": (1.0, 0.3), "same": (1.02, 0.3)})
    _, _, _, answers = answered(file, dense_loss, times)
    same = answers.arms[1]
    assert (same.time_ratio, same.time_spread, same.gain.interval.mean) == (1.0, None, 1.0)
    assert same.budgets["seconds"].verdict == "no difference"


# What it says.


def test_seeds_that_all_differ_alike_give_no_verdict(write_study):
    """As where an arm draws nothing, and only the seed of the draws changes."""
    file = write_study(seeds={"model": 0, "data": 0, "method": [0, 1, 2]})
    runs, _, _, answers = answered(file, lambda run: 3.0 - 0.1 * (run.arm == "layers"))
    compared = answers.arms[1].budgets["tokens"]
    assert (compared.verdict, compared.difference.p) == (None, None)
    assert any("all seeds differ alike" in warning for warning in answers.warnings)
    assert "pays" not in answers_text(runs, answers).split("warning")[0]


def test_a_baseline_that_diverges_gives_no_verdict(write_study):
    file = write_study()

    def loss(run: StudyRun) -> float | None:
        return None if (run.arm, run.seed) == ("dense", 1) else 3.0 + 0.01 * run.seed**2

    _, _, _, answers = answered(file, loss)
    assert answers.arms[1].budgets["tokens"].verdict is None
    assert any("the baseline diverged with seed 1" in warning for warning in answers.warnings)


def test_what_could_be_seen_goes_by_the_number_of_arms(write_study):
    arms = {"dense": DENSE} | {
        f"arm_{i}": {**DENSE, "optimizer.lr": 1e-4 * (i + 1)} for i in range(4)
    }
    rng = np.random.default_rng(0)
    noise: dict[str, float] = {}

    def loss(run: StudyRun) -> float:
        return 3.0 + noise.setdefault(run.key, rng.normal(0.0, 0.01))

    _, _, _, answers = answered(write_study(arms=arms, budgets=["tokens"]), loss)
    for arm in answers.arms[1:]:
        difference = arm.budgets["tokens"].difference
        # The power at 5 % over four arms is 80 % there.
        effect = difference.detectable / difference.spread * 3**0.5
        edge = stats.t.ppf(1 - 0.05 / 4 / 2, 2)
        # P(T > edge) = E[Phi(effect - edge sqrt(V / 2))] over V of chi square with two degrees.
        shares = (np.arange(20_000) + 0.5) / 20_000
        over = stats.norm.cdf(effect - edge * np.sqrt(stats.chi2.ppf(shares, 2) / 2))
        assert over.mean() == pytest.approx(0.8, abs=1e-3)


def test_two_arms_of_one_method_do_not_differ_and_a_worse_one_costs(write_study):
    arms = {"dense": DENSE, "same": DENSE}
    arms["broken"] = {**DENSE, "optimizer.lr": 3.0}
    noise = {0: 0.001, 1: -0.002, 2: 0.0015}

    def loss(run: StudyRun) -> float:
        return dense_loss(run) + (3.0 + noise[run.seed]) * (run.arm == "broken")

    file = write_study(arms=arms, dense_curve=[0.5, 1.0, 1.5])
    _, _, _, answers = answered(file, loss)
    by_name = {arm.name: arm for arm in answers.arms}
    dense, same, broken = (by_name[name] for name in arms)
    for budget in ("tokens", "flops"):
        assert same.budgets[budget].verdict == "no difference"
        assert broken.budgets[budget].verdict == "costs"
        # By hand: the mean of 3 and its noise, and Student's t of two degrees of freedom.
        spread = np.std(list(noise.values()), ddof=1)
        interval = broken.budgets[budget].difference.interval
        assert interval.mean == pytest.approx(3.0 + np.mean(list(noise.values())))
        assert interval.high - interval.mean == pytest.approx(4.302653 * spread / 3**0.5, rel=1e-5)
    assert dense.budgets == {} and same.gain.interval.mean == 1.0
    assert broken.gain.interval is None and broken.gain.bound == "< 0.5"


def test_an_arm_that_diverges_costs(write_study):
    file = write_study()

    def loss(run: StudyRun) -> float | None:
        return None if (run.arm, run.seed) == ("layers", 1) else 3.0 + 0.01 * run.seed

    runs, _, _, answers = answered(file, loss)
    compared = answers.arms[1].budgets["tokens"]
    assert (compared.verdict, compared.diverged, compared.difference.pairs) == ("costs", (1,), 2)
    assert "costs (1 diverged)" in answers_text(runs, answers)


def test_a_run_that_diverged_has_read_no_other_batches(write_study):
    """It ends before its last step, whose batch is another than that of the step it ended at."""
    runs, wanted, results, _ = answered(write_study(), dense_loss)
    results.add(result_of(runs.run("layers", 1, ()), None, data=("a", "an earlier one")))
    assert not [w for w in answer(runs, wanted, results).warnings if "other batches" in w]


def test_arms_that_read_other_batches_are_told(write_study):
    runs, wanted, results, _ = answered(write_study(), dense_loss)
    run = runs.run("layers", 2, ())
    results.add(result_of(run, 3.0, data=("a", "other")))
    warnings = answer(runs, wanted, results).warnings
    assert [w for w in warnings if "layers, seed 2" in w and "other batches" in w]


def test_a_verdict_stands_in_the_row_of_its_arm_in_100_columns(write_study):
    name, noise = "decay_drop_often", {0: 0.0100, 1: -0.0101, 2: 0.0240}
    file = write_study(arms={"dense": DENSE, name: {"method": LAYERS}})
    runs, _, _, answers = answered(
        file, lambda run: 3.0 + 0.1 * run.seed + noise[run.seed] * (run.arm == name)
    )
    more = answers.arms[1].budgets["flops"].more_seeds
    assert more and more > 9
    text = answers_text(runs, answers).partition("Below 0")[0]
    rows = [line for line in text.splitlines() if name in line and "undecided" in line]
    assert len(rows) == 2 and all(row.endswith(f"undecided ({more} more seeds)") for row in rows)
    assert max(map(len, text.splitlines())) <= 100


def test_what_a_row_has_no_room_for_goes_on_below_it(write_study):
    name = "an_arm_with_a_name_that_is_longer_than_others"
    file = write_study(arms={"dense": DENSE, name: {"method": LAYERS}}, budgets=["tokens"])
    noise = {0: 0.0100, 1: -0.0101, 2: 0.0240}
    runs, _, _, answers = answered(
        file, lambda run: 3.0 + 0.1 * run.seed + noise[run.seed] * (run.arm == name)
    )
    text = answers_text(runs, answers).partition("Below 0")[0]
    table = text.partition("At equal tokens")[2].splitlines()
    [row] = [i for i, line in enumerate(table) if name[:10] in line]
    assert table[row].split()[1:7] == ["8", "3", "+0.0080", "-0.0346", "to", "+0.0505"]
    assert "undecided" in table[row] and "---" in table[row - 1]
    assert "".join(line.split()[0] for line in table[row:] if line.startswith(" ")).startswith(name)


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.0497, "0.0497"),
        (0.049996, "0.049996"),
        (0.05, "0.050"),
        (0.0503, "0.0503"),
        (0.0323, "0.032"),
        (0.0001, "<0.001"),
        (1.0, "1.000"),
    ],
)
def test_a_rounded_p_never_says_other_than_the_verdict(p, text):
    assert p_text(p) == text
