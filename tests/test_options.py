"""The table of `configs/LAYOUTS.md`: every cell that says works trains, every other is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from conftest import ROOT
from est_ds.config.run_file import load_run
from est_ds.design import make_design
from est_ds.engine.settings import deepspeed_config
from est_ds.errors import UserError
from est_ds.run.metrics import read_metrics
from layouts import BF16_BOUND, LAYOUTS, METHODS, Lazily
from reference import assert_close, plain_adamw
from workers import train_all

COLUMNS = {
    "ZeRO 0": "data 2, ZeRO 0",
    "ZeRO 1": "data 2, ZeRO 1",
    "ZeRO 2": "data 2, ZeRO 2",
    "ZeRO 3": "data 2, ZeRO 3",
    "pipe, ZeRO 0": "pipe 2, ZeRO 0",
    "pipe, ZeRO 1": "pipe 2 x data 2, ZeRO 1",
}
# What est_ds itself offers is tried by the fast tests: test_layouts.py has the others.
FAST = [
    ("activation_checkpointing=true", "pipe, ZeRO 0"),
    ("parallel.offload=true", "ZeRO 2"),
]


def cells() -> list[tuple[tuple[str, ...], str, str]]:
    """(overrides, column, works or refused) of the table."""
    text = (ROOT / "configs" / "LAYOUTS.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heading = [name.strip() for name in lines[0].strip("|").split("|")][1:]
    assert heading == list(COLUMNS)
    found = []
    for line in lines[2:]:
        first, *words = [cell.strip() for cell in line.strip("|").split("|")]
        if len(words) == len(heading):
            overrides = tuple(re.findall("`([^`]+)`", first))
            found += [(overrides, column, word) for column, word in zip(heading, words)]
    assert {word for *_, word in found} == {"works", "refused"}
    return found


def arguments(column: str, overrides: tuple[str, ...]) -> list[str]:
    return [*LAYOUTS[COLUMNS[column]][1], f"method={METHODS['est']}", *overrides]


REFUSED = [(o, c) for o, c, word in cells() if word == "refused"]
WORKS = [(o, c) for o, c, word in cells() if word == "works"]


@pytest.mark.parametrize(("overrides", "column"), REFUSED)
def test_refused_with_the_field_and_what_to_do(overrides, column, synthetic_run):
    with pytest.raises(UserError) as refused:
        make_design(load_run(synthetic_run, arguments(column, overrides)))
    field = overrides[0].split("=")[0]
    assert field.split(".")[-1] in str(refused.value)
    assert re.search("remove|set |change|use ", str(refused.value))


@pytest.mark.parametrize(
    ("option", "use"),
    [
        ("communication_data_type=int8", "use fp32, bf16, fp16, or remove it"),
        ("gradient_predivide_factor=0", "use a number above 0, or remove it"),
        ("gradient_predivide_factor=two", "use a number above 0, or remove it"),
        ("prescale_gradients=1", "use true or false, or remove it"),
    ],
)
def test_values_that_deepspeed_would_find_wrong_when_processes_run(option, use, synthetic_run):
    key, value = option.split("=")
    shown = repr(value) if value.isalnum() and not value.isdigit() else value
    with pytest.raises(UserError, match=f"deepspeed.{key}={shown}: {use}"):
        make_design(load_run(synthetic_run, arguments("ZeRO 1", (f"deepspeed.{option}",))))


def test_buckets_are_even_as_deepspeed_asks(synthetic_run):
    """A pipe stage, or a BERT whose head has a bias for every token, may have an odd number."""
    config = load_run(synthetic_run, arguments("ZeRO 1", ()))
    for parameters, bucket in ((1, 2), (6, 6), (7, 8), (10**9 + 1, 500_000_000)):
        settings = deepspeed_config(config, data_parallel=2, parameters=parameters)
        assert settings["zero_optimization"]["allgather_bucket_size"] == bucket
    odd = ("deepspeed.zero_optimization.allgather_bucket_size=7",)
    with pytest.raises(UserError, match="allgather_bucket_size=7: must be even; use 8"):
        make_design(load_run(synthetic_run, arguments("ZeRO 1", odd)))


@pytest.fixture(scope="session")
def expected(synthetic_run, tmp_path_factory):
    """Losses of one process of plain torch by what changes them."""
    folder = tmp_path_factory.mktemp("expected")
    kinds = {(): [], ("bf16",): ["precision=bf16"], ("freeze",): ["optimizer.inactive=freeze"]}

    def train(kind: tuple[str, ...]) -> list[float]:
        overrides = [f"run_dir={folder}/run", "parallel={}", f"method={METHODS['est']}"]
        return plain_adamw(load_run(synthetic_run, [*overrides, *kinds[kind]])).losses

    return Lazily(train)


def check(some, folder: Path, run: Path, expected) -> None:
    """Trains the cells of one number of processes in one start, and compares their losses."""
    jobs: dict[int, list] = {}
    for i, (overrides, column) in enumerate(some):
        directory = folder / str(i)
        given = [o.replace("output_path: csv", f"output_path: {folder}/csv") for o in overrides]
        job = {"run": run, "overrides": [f"run_dir={directory}", *arguments(column, given)]}
        jobs.setdefault(LAYOUTS[COLUMNS[column]][0], []).append(job)
    for processes, of_them in jobs.items():
        train_all(folder / f"processes_{processes}", processes, of_them)
    for i, (overrides, _) in enumerate(some):
        kind = tuple(k for k in ("bf16", "freeze") if any(k in o for o in overrides))
        bound = BF16_BOUND if "bf16" in kind else 1e-5
        losses = [e["loss"] for e in read_metrics(folder / str(i))[0]]
        assert_close(losses, expected[kind], within=bound)


@pytest.mark.parametrize(("option", "column"), FAST)
def test_own_options_train_the_same(option, column, synthetic_run, expected, tmp_path):
    assert ((option,), column) in WORKS
    check([((option,), column)], tmp_path, synthetic_run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", sorted({o for o, _ in WORKS}), ids=" ".join)
def test_option_trains_the_same_wherever_it_works(overrides, synthetic_run, expected, tmp_path):
    if "compile=true" in overrides and not shutil.which("g++"):
        pytest.skip("compile=true needs a C++ compiler on a CPU")
    some = [(o, c) for o, c in WORKS if o == overrides]
    check(some, tmp_path, synthetic_run, expected)
