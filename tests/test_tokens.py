"""`tokens` in place of `steps`: a budget that whole steps cover, wherever a run file is read."""

from __future__ import annotations

import json

import pytest
import yaml

from a_study import make_study
from cases.tiny import make_config
from conftest import ROOT, refused
from est_ds.config.run_config import RunConfig, steps_of_tokens
from est_ds.config.run_file import load_run
from est_ds.config.strict import checked
from est_ds.design import make_design
from est_ds.errors import UserError
from est_ds.report.plan_text import plan_report
from est_ds.run.directory import differences
from est_ds.studies.runs import Chooser, wanted_runs

A_STEP = 8 * 64  # tokens of a step of the tiny run
PHASES = [{"until": 0.3, "layers": 0.5}, {"until": 1.0}]


def in_tokens(tokens, **changes) -> RunConfig:
    tree = make_config().model_dump(mode="json", by_alias=True)
    method = {"name": "est", "phases": PHASES}
    return checked(
        RunConfig, {**tree, "method": method, **changes, "steps": None, "tokens": tokens}
    )


@pytest.fixture
def run_file(tmp_path):
    """Writes a run file with these fields beside those of the tiny run, but for its steps."""

    def write(**length) -> str:
        tree = make_config().model_dump(mode="json", by_alias=True)
        del tree["steps"], tree["start"]
        tree |= {"run_dir": str(tmp_path / "run"), "method": {"name": "est", "phases": PHASES}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree | length))
        return str(tmp_path / "run.yaml")

    return write


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [(1, 1), (A_STEP, 1), (A_STEP + 1, 2), (20 * A_STEP, 20), (20 * A_STEP + 1.0, 21), (1e6, 1954)],
)
def test_the_fewest_steps_that_read_the_tokens(tokens, steps):
    config = in_tokens(tokens)
    assert config.steps == steps
    assert (steps - 1) * A_STEP < tokens <= config.tokens_after(steps)
    assert steps == next(n for n in range(steps + 2) if n * A_STEP >= tokens)


def test_a_run_in_tokens_is_the_run_in_steps(run_file):
    asked = load_run(run_file(tokens=50 * A_STEP - 7))
    plain = load_run(run_file(steps=50))
    resolved = yaml.safe_load(asked.to_yaml())
    assert resolved["steps"] == 50 and "tokens" not in resolved
    assert asked.to_yaml() == plain.to_yaml() and not differences(plain, asked)
    designs = [make_design(config) for config in (asked, plain)]
    phases = designs[0].method.phases
    assert [(p.from_step, p.until_step) for p in phases] == [(0, 15), (15, 50)]
    rates = [[design.learning_rate(step) for step in range(50)] for design in designs]
    assert rates[0] == rates[1]


def test_an_override_takes_the_place_of_the_files_length(run_file):
    assert load_run(run_file(steps=3), ["tokens=5120"]).steps == 10
    assert load_run(run_file(tokens=5120), ["steps=3"]).steps == 3
    assert load_run(run_file(tokens=5120), ["batch.global=4"]).steps == 20
    both = "steps=3 and tokens=5120 both say how long the run is; remove one of them"
    for length, overrides in (
        ({"steps": 3, "tokens": 5120}, []),
        ({"steps": 9}, ["steps=3", "tokens=5120"]),
        ({}, ["tokens=5120", "steps=3"]),
    ):
        with pytest.raises(UserError, match=both):
            load_run(run_file(**length), overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tokens=0"], "tokens=0: "),
        (["tokens=-5"], "tokens=-5: "),
        (["tokens=0.5"], "tokens=0.5: input should be greater than or equal to 1"),
        (["tokens=1.5"], "tokens=1.5: write a whole number, such as 50e9"),
        (["tokens=many"], "tokens='many': input should be a valid number"),
        (["tokens=true"], "tokens=True: "),
        (["tokens=.inf"], "tokens=inf: "),
        (["tokens=1e6", "batch.global=0"], "batch.global=0: "),
        (["tokens=1e6", "data.sequence=long"], "data.sequence='long': "),
        (["token=1e6"], "unknown key 'token'; did you mean 'tokens'?"),
    ],
)
def test_a_wrong_length_is_one_clear_error(overrides, said, run_file, capsys):
    found = refused(capsys, "plan", run_file(steps=9), *overrides)
    assert said in found


def test_a_file_without_a_length_is_refused(run_file, capsys):
    assert "steps is missing; add it to the run file" in refused(capsys, "plan", run_file())


def test_a_plan_says_that_it_rounds(run_file):
    def plan(*overrides: str) -> str:
        return " ".join(
            plan_report(load_run(run_file(steps=1), [*overrides]), as_json=False).split()
        )

    rounded = plan(f"tokens={20 * A_STEP - 1}")
    assert (
        "10,240 = 20 steps x 8 sequences x 64; tokens=10,239 rounded up to whole steps" in rounded
    )
    assert "rounded" not in plan(f"tokens={20 * A_STEP}")
    assert "rounded" not in plan("steps=20")
    report = plan_report(load_run(run_file(tokens=20 * A_STEP - 1)), as_json=True)
    assert json.loads(report)["total_steps"] == 20


def test_tokens_of_a_branch_are_counted_from_its_parents_on():
    """1,000 read in 7 steps; a step now reads 300."""
    for tokens in (1001, 1300, 1301, 5000):
        steps = steps_of_tokens(tokens, 300, 7, 1000)
        assert steps == next(n for n in range(7, 99) if 1000 + (n - 7) * 300 >= tokens)
    start = {"step": 7, "tokens": 4096}
    assert in_tokens(10 * A_STEP, start=start).steps == 7 + 2


def test_the_study_of_a_budget_in_tokens_is_that_in_steps(tmp_path):
    found = []
    for name, length in (("steps", {"steps": 100}), ("tokens", {"tokens": 100 * A_STEP})):
        study = make_study(tmp_path / name, set=length, tune={}, budgets=["tokens"])
        wanted = wanted_runs(study.runs, Chooser({}, {}))
        found.append([(run.arm, run.seed, run.steps) for run in wanted.runs])
    assert found[0] == found[1] and ("dense", 0, 50) in found[0]


def test_fifty_billion_tokens_of_tinyllama():
    """Steps of 1,024 x 2,048: 23,841.9 of them."""
    assert load_run(ROOT / "configs/run/est_tinyllama.yaml", ["tokens=50e9"]).steps == 23842
