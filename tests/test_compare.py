"""`est-ds compare`: what it answers from, what it refuses, and the studies that are here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, est_ds, refused
from est_ds.cli import main
from est_ds.studies.compare import Wish, open_study
from est_ds.studies.results import Header, read_results
from est_ds.studies.runs import Chooser, Runs, wanted_runs
from est_ds.studies.study_file import load_study
from est_ds.studies.todo import START_S
from made_studies import DENSE, dense_loss, result_of

STUDIES = [
    file
    for file in sorted((ROOT / "configs" / "study").glob("*.yaml"))
    if "arms" in yaml.safe_load(file.read_text())
]


def test_results_alone_redraw_everything_and_seeds_that_were_added_stay(write_study, tmp_path):
    file = write_study()
    study = load_study(file).with_seeds({3, 4})
    runs = Runs(study)
    results = read_results(study.results)
    done = est_ds("compare", file, "--dry-run")
    assert "9 runs, 0 of them done" in done.stdout and not results.file.parent.exists()
    left = json.loads(est_ds("compare", file, "--dry-run", "--json").stdout)
    assert len(left["to_train"]) == 9 and left["done"] == 0
    # So small a study takes the time of its starts.
    starts = 9 * START_S / left["jobs"]
    assert starts < left["seconds"] < 1.1 * starts
    assert left["flops"] == pytest.approx(sum(run["flops"] for run in left["to_train"]))
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
    return open_study(str(file), Wish()).header.model_dump_json()


# What it refuses.

FALLING = {"name": "est", "phases": [{"until": 0.5, "layers": 0.5, "lr": 4.0}, {"until": 1.0}]}
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
    "a phase's factor is no decay": (
        {"arms": {"dense": DENSE, "flat": {"method": FALLING, "schedule.final": 0.9}}},
        "arm 'flat': schedule=cosine ends at 9",
    ),
    "the baseline's shorter runs not decayed": (
        {"set": {"steps": 8, "schedule.warmup": 4}, "dense_curve": [0.5, 1.0]},
        "arm 'dense': schedule=cosine ends at 100% of its highest rate after 4 steps",
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
        "seeds: seed 1 would train the run of seed 0 again",
    ),
    "a number of seeds": ({"seeds": 3}, "seeds=3: write a list, [VALUE, ...]"),
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
    "unknown task": (
        {"evaluate": {"tasks": ["next_words"]}},
        "evaluate.tasks.0='next_words': input should be 'next_word' or 'cloze'",
    ),
    "a task twice": (
        {"evaluate": {"tasks": ["cloze", "cloze"]}},
        "evaluate.tasks: has a value twice",
    ),
    "no base": ({"base": "absent.yaml"}, "error: base='absent.yaml': "),
    "set and tuned": (
        {"set": {"optimizer.lr": 3e-3}, "tune": {"optimizer.lr": [1e-3]}},
        "set: optimizer.lr=0.003 cannot take effect, since tune has optimizer.lr",
    ),
    "other places": (
        {"arms": {"dense": DENSE, "wide": {**DENSE, "parallel.processes": 4}}},
        "arm 'wide': parallel.processes=4 differs from the baseline's",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_studies_are_one_clear_error(case, write_study, tmp_path, capsys):
    changes, expected = REFUSED[case]
    assert expected in refused(capsys, "compare", write_study(**changes))
    assert not (tmp_path / "study").exists()


def test_bad_command_lines_and_results_are_one_clear_error(write_study, tmp_path, capsys):
    file = write_study()
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(file), "--dry-run", "--time-only"])
    assert "--time-only: not allowed with argument --dry-run" in capsys.readouterr().err
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
    run = result_of(Runs(load_study(file)).run("layers", 0, ()), 3.0).model_dump(mode="json")
    for field, wrong in (("loss", "NaN"), ("loss", "-1"), ("loss", '"3.1"'), ("flops", "Infinity")):
        line = json.dumps({"run": {**run, field: "WRONG"}}).replace('"WRONG"', wrong)
        results.write_text(json.dumps({"study": header}) + f"\n{line}\n")
        assert "line 2 is no result of a study" in refused(capsys, "compare", file)
    results.write_text("text")
    assert "is no file of results" in refused(capsys, "compare", file)
    results.write_bytes(b"\xff\n")
    assert "it is no text in UTF-8" in refused(capsys, "compare", file)
    results.write_text("text\n")
    assert "line 1 is no result of a study" in refused(capsys, "compare", file)


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_shipped_study_fits(file):
    session = open_study(str(file), Wish(dry_run=True))  # with the seeds that were added
    assert session.results.header is None or (
        session.results.runs.keys() <= session.wanted().by_key.keys()
    )
