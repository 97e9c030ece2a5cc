"""RaPTr's two runs: the published savings and objectives, and data that they can read."""

from __future__ import annotations

import json

import pytest
import yaml

from conftest import ROOT
from est_ds.config.run_file import load_run
from est_ds.data.loader import Portion
from est_ds.report.plan_text import plan_report
from est_ds.run.prepare import prepare

# Block FLOPs saved, parameters in millions, objective.
BERTS = {"name": "mlm", "rate": 0.15, "mask": 0.8, "random": 0.1}
RAPTRS = {"name": "ul2", "mixture": "causal_prefix_span"}
RUNS = {
    "raptr_bert": (1 - 1 / 1.3333, 110.7, BERTS),
    "raptr_ul2": (1 - 1 / 1.2, 1591.3, RAPTRS),
}
SMALL = ["model.hidden_size=96", "model.intermediate_size=64"]


@pytest.mark.parametrize("name", RUNS)
def test_run_has_the_saving_the_size_and_the_objective_of_the_paper(name):
    saved, parameters, objective = RUNS[name]
    file = ROOT / "configs" / "run" / f"{name}.yaml"
    config = load_run(file)
    plan = json.loads(plan_report(config, as_json=True))
    assert plan["saved"]["blocks"] == pytest.approx(saved, abs=5e-5)
    assert plan["parameters"] / 1e6 == pytest.approx(parameters, abs=0.1)
    assert config.objective == objective
    preset = yaml.safe_load((ROOT / "configs" / "method" / file.name).read_text())
    assert config.method == preset


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("method", [[], ["method.name=full"]], ids=["raptr", "dense twin"])
def test_run_reads_a_packed_corpus(name, method, corpus, tmp_path):
    data = [f"data.{part}={corpus / part}" for part in ("train", "valid", "tokenizer")]
    small = [*SMALL, "batch={global: 8, micro: 2}", "evaluate={every: 24, sequences: 4}"]
    overrides = [*data, *small, *method, "steps=24", f"run_dir={tmp_path / 'run'}"]
    run = prepare(load_run(ROOT / "configs" / "run" / f"{name}.yaml", overrides), 2)
    [(inputs, (labels, divisor)), *_] = run.train.micro_batches(3, Portion(1, 2, micro=2))
    assert inputs.shape == labels.shape == (2, run.config.data.sequence)
    assert inputs.max() < run.method.shape.vocabulary and divisor > 0
