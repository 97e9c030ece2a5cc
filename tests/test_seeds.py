"""Weights, data and plans each by a seed of its own."""

from __future__ import annotations

import shutil

import pytest

from conftest import refused, train
from est_ds.config.run_file import load_run
from est_ds.run.directory import differences
from est_ds.run.metrics import read_metrics
from est_ds.verify_resume.short import shortened
from workers import train_all

SHORT = ["parallel={}", "steps=3", "checkpoint.every=2"]
SHORT += [f"method.phases.{i}.until={u}" for i, u in enumerate((1, 2, 3))]
# What each run draws with; the first has one seed for all.
RUNS = {
    "one": ["seed=3"],
    "same": ["seed=8", "seeds={model: 3, data: 3, method: 3}"],
    "model": ["seed=3", "seeds.model=8"],
    "data": ["seed=3", "seeds.data=8"],
    "method": ["seed=3", "seeds.method=8"],
}
CHANGED = {
    "one": set(),
    "same": set(),
    "model": {"loss"},
    "data": {"loss", "data_digest"},
    "method": {"loss", "plan_digest"},
}


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    jobs = [
        {"run": tiny_run, "overrides": [f"run_dir={folder}/{name}", *SHORT, *seeds]}
        for name, seeds in RUNS.items()
    ]
    train_all(folder / "ranks", 1, jobs)
    return folder


def test_each_seed_changes_what_it_is_of_and_nothing_else(trained):
    """In the first step; a plan of a few columns may differ in any."""
    one, _ = read_metrics(trained / "one")
    for name, changed in CHANGED.items():
        lines, _ = read_metrics(trained / name)
        found = {k for k in ("loss", "data_digest", "plan_digest") if lines[0][k] != one[0][k]}
        assert found == changed, name
        same = {"data_digest", "plan_digest"} - changed
        assert all(a[k] == b[k] for a, b in zip(lines, one) for k in same), name
    lines, _ = read_metrics(trained / "same")
    assert [line["loss"] for line in lines] == [line["loss"] for line in one]


def test_seeds_of_a_run_never_change(trained, capsys):
    for override, said in {"seed=4": "seed is 3 there", "seeds.method=9": "is 8 there"}.items():
        assert said in refused(capsys, "train", trained / "method", override)
    former = load_run(trained / "one")
    assert not differences(former, load_run(trained / "one", ["seeds={}"]))


def test_short_version_of_a_run_has_its_seeds(trained):
    assert shortened(load_run(trained / "data"), 3).seeds.data == 8


@pytest.mark.slow
def test_run_with_seeds_of_its_own_resumes_as_if_it_had_not_stopped(trained, tmp_path):
    run_dir = shutil.copytree(trained / "model", tmp_path / "run")
    (run_dir / "checkpoints" / "latest").write_text("step_00000002\n")
    done = train(run_dir, processes=1)
    assert done.returncode == 0 and "resuming at step 2" in done.stdout, done.stderr
    kept = ("loss", "grad_norm", "plan_digest", "data_digest")
    found, expected = (
        [[line[k] for k in kept] for line in read_metrics(run)[0]]
        for run in (run_dir, trained / "model")
    )
    assert found == expected


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seeds={weights: 3}", ["unknown key 'seeds.weights'", "model, data, method"]),
        ("seeds.data=-1", ["seeds.data=-1"]),
        ("seeds=3", ["seeds=3"]),
    ],
)
def test_seeds_that_are_none_are_refused(override, named, tiny_run, tmp_path, capsys):
    error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path}/run", override)
    assert all(text in error for text in named), error
