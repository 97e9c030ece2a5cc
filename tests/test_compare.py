"""`est-ds compare`: what a study trains, survives, refuses and says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from conftest import ROOT, est_ds, refused
from est_ds.run.metrics import read_metrics
from est_ds.run.windows import read_windows
from est_ds.studies.answers import answer
from est_ds.studies.results import ArmTimes, Header, RunResult, Times, read_results
from est_ds.studies.runs import Chooser, Runs, StudyRun, check_study, wanted_runs
from est_ds.studies.study_file import load_study
from est_ds.studies.text import answers_text
from est_ds.studies.times import known_ratios

LAYERS = {"name": "raptr", "phases": [{"until": 0.5, "layers": 2}, {"until": 1.0}]}
HALF_LAYERS = {"name": "layer_drop", "drop": 0.5}
DENSE = {"method": {"name": "full"}}


@pytest.fixture
def write_study(tiny_run, tmp_path):
    """Writes a study of the tiny run; what is given replaces or (None) removes a field."""

    def write(**changes) -> Path:
        tree = {
            "study_dir": str(tmp_path / "study"),
            "base": str(tiny_run),
            "set": {"steps": 8, "parallel": {"pipe": 1, "processes": 1}, "checkpoint.every": 4},
            "baseline": "dense",
            "arms": {"dense": DENSE, "layers": {"method": LAYERS}},
            "seeds": [0, 1, 2],
            "budgets": ["tokens", "flops"],
        }
        tree = {k: v for k, v in {**tree, **changes}.items() if v is not None}
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    return write


def result_of(run: StudyRun, loss: float | None, data: tuple[str, str] = ("a", "b")) -> RunResult:
    """What a run would have found that came to this loss."""
    return RunResult(
        run=run.key,
        arm=run.arm,
        seed=run.seed,
        values=dict(run.values),
        steps=run.steps,
        tokens=run.tokens,
        parameters=1,
        flops=run.flops.model,
        blocks_flops=run.flops.blocks,
        loss=loss,
        data=data,
        device="cpu",
    )


def answered(file: Path, loss_of, times: Times | None = None):
    """The answers of a study whose runs all came to the loss that `loss_of` says."""
    runs = Runs(load_study(file))
    results = read_results(runs.file.results)
    results.begin(Header(study="x", corpora=None))
    if times:
        results.add_times(times)
    while True:  # until no run waits for a grid any more
        chooser = Chooser(results.losses, known_ratios(runs, results.times))
        wanted = wanted_runs(runs, chooser)
        todo = [run for run in wanted.runs if run.key not in results.runs]
        if not todo:
            return runs, wanted, results, answer(runs, wanted, results)
        for run in todo:
            results.add(result_of(run, loss_of(run)))


def times_of(file: Path, arms: dict[str, tuple[float, float]]) -> Times:
    """Step times of arms, each with its ratio and spread, on a machine that was busy."""
    runs = Runs(load_study(file))
    measured = {
        arm: ArmTimes(
            run=runs.timed_key(arm), ratio=ratio, cpu_ratio=ratio, step_s=0.2 * ratio, spread=spread
        )
        for arm, (ratio, spread) in arms.items()
    }
    return Times(device="cpu", processes=1, arms=measured, busy=1.0, measured="")


def dense_loss(run: StudyRun) -> float:
    """A curve of losses with an offset for every seed."""
    return 3.0 + 2.0 * (run.flops.model / 1e9) ** -0.5 + 0.02 * run.seed


STUDIES = [
    file
    for file in sorted((ROOT / "configs" / "study").glob("*.yaml"))
    if "arms" in yaml.safe_load(file.read_text())
]

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
    assert dense.budgets == {} and same.gain.interval.mean == pytest.approx(1.0, rel=1e-3)
    assert broken.gain.interval is None and broken.gain.bound == "< 0.5"


def test_an_arm_that_diverges_costs(write_study):
    file = write_study()

    def loss(run: StudyRun) -> float | None:
        return None if (run.arm, run.seed) == ("layers", 1) else 3.0 + 0.01 * run.seed

    runs, _, _, answers = answered(file, loss)
    compared = answers.arms[1].budgets["tokens"]
    assert (compared.verdict, compared.diverged, compared.difference.pairs) == ("costs", (1,), 2)
    assert "costs (1 diverged)" in answers_text(runs, answers)


def test_arms_that_read_other_batches_are_told(write_study):
    runs, wanted, results, _ = answered(write_study(), dense_loss)
    run = runs.run("layers", 2, ())
    results.add(result_of(run, 3.0, data=("a", "other")))
    warnings = answer(runs, wanted, results).warnings
    assert [w for w in warnings if "layers, seed 2" in w and "other batches" in w]


def test_results_alone_redraw_everything_and_seeds_that_were_added_stay(write_study, tmp_path):
    file = write_study()
    study = load_study(file).with_seeds({3, 4})
    runs = Runs(study)
    results = read_results(study.results)
    done = est_ds("compare", file, "--dry-run")
    assert "9 runs, 0 of them done" in done.stdout and not results.file.parent.exists()
    header = json.loads(identity_of(file))
    results.begin(Header(**header))
    for run in wanted_runs(runs, Chooser({}, {})).runs:
        results.add(result_of(run, dense_loss(run)))
    found = est_ds("compare", file, "--json")
    assert found.returncode == 0, found.stderr
    document = json.loads(found.stdout)
    assert document["seeds"] == [0, 1, 2, 3, 4] and document["runs"] == 15
    difference = document["arms"]["layers"]["budgets"]["flops"]["difference"]
    assert difference["pairs"] == 5 and set(difference["interval"]) == {"mean", "low", "high"}
    assert document["arms"]["dense"]["budgets"] == {}
    # The page too, which no run directory is needed for.
    page = study.folder / "study.html"
    assert found.stderr == f"the page is {page}\n" and "layers" in page.read_text()


def identity_of(file: Path) -> str:
    """The header that a study writes, as JSON."""
    from est_ds.studies.compare import Wish, _open

    return _open(str(file), Wish()).header.model_dump_json()


# What it survives.


def test_a_study_that_is_killed_goes_on_and_trains_no_finished_run_again(write_study, tmp_path):
    arms = {"dense": DENSE}
    arms["faster"] = {**DENSE, "optimizer.lr": 5e-3}
    small = {"steps": 8, "parallel": {"pipe": 1, "processes": 1}, "checkpoint.every": 4}
    file = write_study(arms=arms, seeds=[0], intervals=False, budgets=["tokens"], set=small)
    results = tmp_path / "study" / "results.jsonl"
    command = [sys.executable, "-m", "est_ds.cli", "compare", str(file), "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    begun = tmp_path / "study" / "faster" / "seed_0" / "train.log"
    wait_until(lambda: begun.exists() and b"starting at step" in begun.read_bytes())
    process.kill()
    process.wait()
    # As a kill in the middle of a line leaves it.
    with results.open("a") as f:
        f.write('{"run": {"run": "12')
    done = est_ds("compare", file, "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_results(results)
    by_arm = {r.arm: r for r in found.runs.values()}
    assert len(results.read_text().splitlines()) == 3 and by_arm.keys() == {"dense", "faster"}
    # Equal tokens: the same batches, step by step, and the same loss before the first step.
    read = [
        [step["data_digest"] for step in read_metrics(tmp_path / "study" / arm / "seed_0")[0]]
        for arm in arms
    ]
    assert read[0] == read[1] and len(set(read[0])) == 8
    assert by_arm["dense"].data == by_arm["faster"].data == (read[0][0], read[0][-1])
    assert by_arm["dense"].first_loss == by_arm["faster"].first_loss
    assert by_arm["dense"].loss != by_arm["faster"].loss
    log = (tmp_path / "study" / "dense" / "seed_0" / "train.log").read_text()
    assert log.count("starting at step 0") == 1 and "resuming" not in log
    for arm, result in by_arm.items():
        assert not (tmp_path / "study" / arm / "seed_0" / "checkpoints").exists()
        windows = read_windows(found.windows(result.run))["valid"]
        assert windows.mean == pytest.approx(result.loss, rel=1e-6)
    assert "one seed" in done.stdout
    assert len(processes_about(str(tmp_path))) == 0


@pytest.mark.slow
def test_a_notice_saves_the_runs_under_way_and_a_failed_run_does_not_end_the_others(
    write_study, tmp_path
):
    arms = {"dense": DENSE, "layers": {"method": LAYERS}}
    long = {"steps": 400, "parallel": {"pipe": 1, "processes": 1}, "checkpoint.every": 400}
    file = write_study(arms=arms, seeds=[0], intervals=False, budgets=["tokens"], set=long)
    study = tmp_path / "study"
    command = [sys.executable, "-m", "est_ds.cli", "compare", str(file), "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    metrics = study / "layers" / "seed_0" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "start it again to go on" in said
    saved = list((study / "layers" / "seed_0" / "checkpoints").glob("step_*"))
    assert len(saved) == 1 and not processes_about(str(tmp_path))
    # A run whose directory cannot be used fails by itself.
    (study / "dense" / "seed_0" / "config.yaml").write_text("steps: 3\n")
    done = est_ds("compare", file)
    assert done.returncode == 1 and "failed: dense/seed_0" in done.stdout
    assert {r.arm for r in read_results(study / "results.jsonl").runs.values()} == {"layers"}


@pytest.mark.slow
def test_step_times_are_measured_in_turns(write_study, tmp_path):
    file = write_study(arms={"dense": DENSE, "half": {"method": HALF_LAYERS}})
    done = est_ds("compare", file, "--time-only", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    times = read_results(tmp_path / "study" / "results.jsonl").times
    assert times.arms.keys() == {"dense", "half"} and times.arms["half"].ratio < 1.0
    assert not (tmp_path / "study" / "dense").exists()
    assert "half: 0." in done.stdout


def wait_until(happened, limit_s: float = 240.0) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_about(text: str, limit_s: float = 20.0) -> list[str]:
    """Command lines that name a folder, once those that are ending have ended."""
    deadline = time.monotonic() + limit_s
    while True:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if text in line and int(process.name) != os.getpid():
                found.append(line)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


# What it refuses.

REFUSED = {
    "no baseline": ({"baseline": "dens"}, "baseline='dens' is not among the arms; did you mean"),
    "unknown field": ({"arm": {}}, "unknown key 'arm'; did you mean 'arms'?"),
    "one seed": ({"seeds": [0]}, "seeds has one seed, which gives no interval"),
    "a pilot of several": ({"intervals": False}, "intervals=false has no effect with several"),
    "seeds twice": ({"seeds": [0, 0]}, "seeds: has a value twice"),
    "unequal lists": (
        {"seeds": {"model": [0, 1], "data": [0], "method": 0}},
        "need lists of one length",
    ),
    "other corpus": (
        {"arms": {"dense": DENSE, "long": {**DENSE, "data.sequence": 32}}},
        "arm 'long': data=",
    ),
    "other batch": (
        {"arms": {"dense": DENSE, "big": {**DENSE, "batch.global": 16}}},
        "arm 'big': batch.global=16 differs from the baseline's 8",
    ),
    "other precision": (
        {"arms": {"dense": DENSE, "short": {**DENSE, "precision": "bf16"}}},
        "arm 'short': precision='bf16' differs from the baseline's 'fp32'",
    ),
    "not decayed": (
        {"arms": {"dense": DENSE, "flat": {**DENSE, "schedule": {"name": "wsd", "decay": 0}}}},
        "arm 'flat': schedule=wsd ends at 100% of its highest rate",
    ),
    "method": (
        {"arms": {"dense": DENSE, "odd": {"method": {"name": "est"}}}},
        "arm 'odd': method.phases is missing",
    ),
    "tuned twice": (
        {"tune": {"optimizer.lr": [1e-3]}, "arms": {"dense": {"optimizer.lr": 3e-3}}},
        "arms.dense: optimizer.lr=0.003 cannot take effect, since tune has optimizer.lr",
    ),
    "taken": ({"set": {"seed": 3}}, "set: seed cannot be set, since the study gives every run"),
    "empty grid": ({"tune": {"optimizer.lr": []}}, "tune.optimizer.lr"),
    "no field": (
        {"arms": {"dense": {**DENSE, "optimizer.rate": 3e-3}}},
        "arm 'dense': unknown key 'optimizer.rate'",
    ),
    "equal seeds": (
        {"seeds": {"model": [0, 0], "data": 0, "method": 0}},
        "seeds: the 2th and the 1th train the same run",
    ),
    "a number of seeds": ({"seeds": 3}, "seeds=3: input should be a valid list"),
    "an arm that is a folder": ({"arms": {"dense": DENSE, "..": DENSE}}, "arms"),
    "tuned steps": ({"tune": {"steps": [4, 8]}}, "arms.dense: tune has steps"),
    "tuned twice alike": ({"tune": {"optimizer.lr": [1e-3, 1e-3]}}, "optimizer.lr twice"),
    "tuned time": (
        {
            "tune": {"method.drop": [0.1, 0.2]},
            "budgets": ["seconds"],
            "arms": {"dense": {"method": {"name": "layer_drop"}}},
        },
        "tune has method.drop, which may change the time of a step",
    ),
    "no base": ({"base": "absent.yaml"}, "absent.yaml"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_studies_are_one_clear_error(case, write_study, tmp_path, capsys):
    changes, expected = REFUSED[case]
    assert expected in refused(capsys, "compare", write_study(**changes))
    assert not (tmp_path / "study").exists()


def test_bad_command_lines_and_results_are_one_clear_error(write_study, tmp_path, capsys):
    file = write_study()
    assert "--jobs=100" in refused(capsys, "compare", file, "--jobs", "100", "--dry-run")
    assert "--only='lairs' is no arm" in refused(capsys, "compare", file, "--only", "lairs")
    results = tmp_path / "study" / "results.jsonl"
    results.parent.mkdir()
    header = json.loads(identity_of(file))
    for wrong, expected in (
        ({**header, "study": "another"}, "holds the results of another study"),
        (
            {**header, "corpora": {"train.0": "0", "valid.valid": "0"}},
            "other corpora: data.train.0",
        ),
        ({**header, "format": 9}, "format 9, and this version reads 1"),
    ):
        results.write_text(json.dumps({"study": wrong}) + "\n")
        assert expected in refused(capsys, "compare", file)
    results.write_text("text")
    assert "is no file of results" in refused(capsys, "compare", file)
    results.write_bytes(b"\xff\n")
    assert "it is no text in UTF-8" in refused(capsys, "compare", file)
    results.write_text("text\n")
    assert "line 1 is no result of a study" in refused(capsys, "compare", file)


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_shipped_study_fits(file):
    runs = Runs(load_study(file))
    check_study(runs)
    committed = read_results(runs.file.results)
    assert committed.header is None or committed.runs.keys() <= keys_of(runs, committed.losses)


def keys_of(runs: Runs, losses: dict[str, float]) -> set[str]:
    """The runs that a study wants, as far as its results choose them."""
    return set(wanted_runs(runs, Chooser(losses, {})).by_key)
