"""Models understood without their library are those that the library builds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from transformers import AutoConfig

from cases.families import CASES
from cases.tiny import make_config
from conftest import ROOT
from est_ds.config.published import of_training
from est_ds.cost.known_fields import FIELDS
from est_ds.cost.known_models import known_model
from est_ds.cost.parameters import pipe_stage_parameters, total_parameters
from est_ds.design import Design, make_design, make_outline
from est_ds.slicing.build import count_parameters, empty_model, piece_sizes
from est_ds.slicing.families import family_of, hf_config
from est_ds.slicing.families.fields import dropout_of

SHIPPED = sorted((ROOT / "configs" / "model").glob("*.yaml"))
SECTIONS = {
    **{name: case.section for name, case in CASES.items()},
    **{file.stem: yaml.safe_load(file.read_text()) for file in SHIPPED},
    **{f"{name} by default": {"model_type": name} for name in FIELDS},
    "few key/value heads": {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 34},
    "mamba with biases": {"model_type": "mamba", "use_bias": True, "use_conv_bias": False},
    "qwen3 with biases": {"model_type": "qwen3", "attention_bias": True},
    "bert untied": {"model_type": "bert", "tie_word_embeddings": False, "type_vocab_size": 3},
    "several ends": {"model_type": "llama", "eos_token_id": [2, 31999], "pad_token_id": None},
    **{
        f"published {file.stem}": of_training(json.loads(file.read_text()))
        for file in sorted((ROOT / "tests" / "cases" / "published").glob("*.json"))
        if file.stem != "mamba_130m"
    },
}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_shape_alone_gives_the_counts_of_the_empty_model(name):
    section = SECTIONS[name]
    known, config = known_model(section, sequence=4), hf_config(section)
    family, model = family_of(section["model_type"]), empty_model(config)
    assert known.shape == family.shape(config)
    assert known.dropout == dropout_of(config) and list(known.dropout) == list(dropout_of(config))
    assert (known.head, known.separable) == (family.auto_class, family.separable)
    assert total_parameters(known.pieces) == count_parameters(model)
    pieces = piece_sizes(model)
    assert [p.layer for p in known.pieces] == [p.layer for p in pieces]
    assert [p.own for p in known.pieces] == [p.own for p in pieces]
    for first in ([], [1], [2, 3]):
        cuts = [*first, known.shape.num_layers]
        assert pipe_stage_parameters(known.pieces, cuts) == pipe_stage_parameters(pieces, cuts)


@pytest.mark.parametrize("model_type", FIELDS)
def test_defaults_are_those_of_the_library(model_type):
    kind = type(AutoConfig.for_model(model_type))
    defaults = {name: field.default for name, field in kind.__dataclass_fields__.items()}
    for name, (fits, default) in FIELDS[model_type].items():
        if (model_type, name) in {("qwen2", "head_dim"), ("t5", "tie_word_embeddings")}:
            continue  # no field of its own
        assert default == defaults[name] and fits(default), name


@pytest.mark.parametrize(
    "change",
    [
        {"from": "some/model"},
        {"hiden_size": 64},
        {"num_attention_heads": 7},
        {"num_key_value_heads": 5},
        {"hidden_size": "64"},
        {"vocab_size": 0},
        {"hidden_act": "sulu"},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"pretraining_tp": 2},
        {"bos_token_id": 10**9},
        {"eos_token_id": [0, -1]},
        {"model_type": "qwen2", "sliding_window": 64},
        {"model_type": "qwen2", "use_sliding_window": True},
        {"init": {"residual": "tinyllama", "std": 0.02}},
        {"max_position_embeddings": 3},
        {"model_type": "gpt_neox"},
    ],
    ids=str,
)
def test_what_may_be_wrong_is_the_librarys_to_say(change):
    assert known_model({**CASES["llama"].section, **change}, sequence=4) is None


def test_an_outline_is_the_design_but_for_what_builds_it():
    config = make_config(parallel={"pipe": 2, "zero": 1})
    outline, design = make_outline(config), make_design(config)
    assert not isinstance(outline, Design)
    for name in ("cuts", "dropout", "decoder_start", "pipe_stage_parameters", "target_sequence"):
        assert getattr(outline, name) == getattr(design, name)
    assert outline.method.shape == design.method.shape
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    scaled = make_config(model={**config.model, "rope_parameters": rope})
    assert isinstance(make_outline(scaled), Design)


SCRIPT = """
import sys
from est_ds.cli import main
for run in sys.argv[1:]:
    main(["plan", run, "--gpu", "h100-80g", "--count", "2", "--layouts"])
print(sorted({"torch", "transformers", "deepspeed", "matplotlib"} & set(sys.modules)))
"""


def test_a_plan_of_the_shipped_run_files_imports_no_torch():
    runs = sorted(map(str, (ROOT / "configs" / "run").glob("*.yaml")))
    call = [sys.executable, "-c", SCRIPT, *runs]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert done.stdout.count("FLOPs saved") == len(runs) > 4


CHECK = """
import sys
from est_ds.config.run_file import load_run
from est_ds.run.prepare import check_run
print(check_run(load_run(sys.argv[1], ["run_dir=" + sys.argv[2]]), 2))
print(sorted({"torch", "transformers", "deepspeed"} & set(sys.modules)))
"""


def test_who_starts_the_processes_checks_a_run_without_building_it(synthetic_run, tmp_path):
    call = [sys.executable, "-c", CHECK, str(synthetic_run), str(tmp_path / "run")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "run"), "[]"]
