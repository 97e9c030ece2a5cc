"""Run files, section files, JSON and the command line go through one reader, of YAML 1.2."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from est_ds.cli import _parse
from est_ds.config.run_file import in_effect, load_run
from est_ds.config.strict import checked
from est_ds.config.yaml12 import dump, parse, read_mapping
from est_ds.design import make_design
from est_ds.errors import UserError
from est_ds.plans.methods.pld import PldSettings
from est_ds.slicing.families import hf_config
from est_ds.studies.study_file import _overrides

# As TinyLlama-1.1B's is published.
TINYLLAMA_JSON = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1,
  "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
  "intermediate_size": 5632, "max_position_embeddings": 2048, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
\t"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
  "tie_word_embeddings": false, "torch_dtype": "float32", "transformers_version": "4.35.0",
  "use_cache": true, "vocab_size": 32000
}"""


def test_types_are_those_of_yaml_1_2_and_json():
    """YAML 1.2.2, section 10.3.2; the first line's would be other ones in YAML 1.1."""
    for text, value in {
        "1e-05": 1e-5,
        "1e-6": 1e-6,
        "012": 12,
        "0o14": 12,
        "on": "on",
        "yes": "yes",
        "1_0": "1_0",
        "0x1F": 31,
        "12e03": 12000.0,
        "-.5": -0.5,
        "1.": 1.0,
        "+5": 5,
        "2.0": 2.0,
        "'1.0'": "1.0",
        "true": True,
        "False": False,
        "~": None,
        "": None,
        "-.INF": -math.inf,
        "1:30": "1:30",
        "2024-01-01": "2024-01-01",
        '"\\ud83d\\ude00"': "\N{GRINNING FACE}",
        "{a: &x {b: 1}, c: {<<: *x, b: 2}}": {"a": {"b": 1}, "c": {"b": 2}},
    }.items():
        found = parse(text)
        assert (found, type(found)) == (value, type(value)), text


# Ten to the ninth of what stands in the first line.
LAUGHS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb:\n  c: 2\n  'c': 3", "'c' stands twice, in line 3 and in line 4"),
        ("a: 1\n7: 2", "key 7 is no text; quote it (line 2"),
        ("[" * 3000 + "]" * 3000, "more than 64 levels"),
        (f"a0: &a0 [x]\n{LAUGHS}", "more than 1,000,000 values"),
        ("a: &a [*a]", "an alias stands for something that holds the alias"),
        ("9" * 5000, "more digits than 64 bits can hold"),
        (r'"a\0b"', "NUL"),
        (r'"\ud83d"', "no character"),
        ("!!int x", "does not fit its tag"),
        ("!!python/name:os.system x", "not YAML"),
    ],
)
def test_what_no_field_can_hold_is_refused_once(text, says):
    with pytest.raises(UserError) as error:
        parse(text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_is_written_is_read_again_as_it_was_in_either_version_of_yaml():
    texts = [
        "on",
        "yes",
        "n",
        "012",
        "0o14",
        "1e-5",
        "1_0",
        "1:30",
        "",
        "~",
        "null",
        "a: b",
        "=",
        "<<",
        "2024-01-01",
        "1.0",
        ".5",
        "\u00e9\u2028\N{GRINNING FACE}\n#",
        "-",
        "*a",
    ]
    numbers = [1e-5, 1.5e20, 1e22, 5e-324, 1 / 3, -1, 2**62, None, True]
    tree = {"texts": texts, "numbers": numbers}
    assert parse(dump(tree)) == tree == yaml.safe_load(dump(tree))


def test_an_override_changes_one_field_of_an_aliased_section(tiny_run, tmp_path):
    text = tiny_run.read_text().replace("checkpoint:\n", "checkpoint: &c\n")
    text = text.replace("  keep_last: 0\n", "").replace("log:\n  step_times: false\n", "")
    file = tmp_path / "run.yaml"
    file.write_text(f"{text}log: *c\n")
    config = load_run(file, ["log.every=1"])
    assert (config.log.every, config.checkpoint.every) == (1, 5)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.lr=on", "optimizer.lr='on'"),
        ("optimizer.lr=true", "optimizer.lr=True"),
        ("optimizer.lr='1.0'", "optimizer.lr='1.0'"),
        ("steps=yes", "steps='yes'"),
        ("steps=2.0", "steps=2.0"),
        ("steps='1'", "steps='1'"),
        ("parallel.zero=true", "parallel.zero=True"),
        ("schedule.warmup=false", "schedule.warmup=False"),
        ("compile=1", "compile=1: input should be a valid boolean; write true or false"),
        ("compile=on", "compile='on'"),
        ("log.to=wandb", "log.to='wandb': write a list, [VALUE, ...]"),
        ("schedule=cosine", "schedule='cosine': write a section, {KEY: VALUE, ...}"),
        ("schedule.warmup=soon", "schedule.warmup='soon': input should be a valid number"),
        ("batch.micro=most", "batch.micro='most': write a whole number, or auto"),
        ("run_dir=1e3", "run_dir=1000.0: input should be a valid string; put it in quotes"),
        ("run_dir=''", "run_dir=''"),
        ("optimizer.betas=[1.0, 1.0]", "optimizer.betas.0=1.0: input should be less than 1"),
        ("run_dir=$NO_SUCH_VARIABLE/x", "'NO_SUCH_VARIABLE' is not set"),
        ("data.tokenizer=~nobody-here/t", "~nobody-here is no user's folder"),
        ("deepspeed" + ".a" * 3000 + "=1", "no field lies so deep"),
        ("optimizer={lr: 1, lr: 2}", "'lr' stands twice, in line 1 and in line 1"),
    ],
)
def test_values_of_another_type_are_refused_by_field(override, says, tiny_run):
    with pytest.raises(UserError) as error:
        load_run(tiny_run, [override])
    assert says in str(error.value)


def test_no_field_is_lost_to_one_that_begins_another_section(tiny_run):
    """On a command line, and in a mapping of a study, wherever they stand."""
    given = ["method.drop=0.3", "steps=9", "method.name=layer_drop"]
    parsed = _parse(["plan", str(tiny_run), *given])
    study = _overrides({"method": {"drop": 0.3}, "method.name": "layer_drop"}, Path(), "set")
    for overrides in (parsed.overrides, list(study)):
        method = load_run(tiny_run, overrides).method
        assert method["name"] == "layer_drop" and method["drop"] == 0.3
    assert in_effect(["model.from=a", "model.from=b"]) == ["model.from=a", "model.from=b"]
    first = ["model.from=b", "model.vocab_size=3", "seed=1"]
    assert in_effect([first[1], first[2], first[0]]) == first
    whole = ["model.vocab_size=3", "model=m.yaml", "model.from=b", "model.hidden_act=silu"]
    assert in_effect([*whole[:2], whole[3], whole[2]]) == whole
    with pytest.raises(UserError, match=r"unknown key 'method.drop'"):
        given = _parse(["train", str(tiny_run), "method.drop=0.3", "method.name=full"]).overrides
        make_design(load_run(tiny_run, given))


def test_every_section_refuses_other_types_and_takes_whole_numbers_for_any(tiny_run):
    assert load_run(tiny_run, ["optimizer.lr=1", "seed=012"]).seed == 12
    with pytest.raises(UserError, match="method.count_from=True"):
        checked(PldSettings, {"name": "pld", "count_from": True}, "method")


def test_home_and_variables_in_paths_are_replaced_once(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    (tmp_path / "m.yaml").write_text("model_type: llama\n")
    mixture = "data.train=[{corpus: $DATA/a, weight: 1}, {corpus: b$, weight: 1}]"
    overrides = ["run_dir=~/x", mixture, "data.valid={web: '${DATA}/v'}", "model=~/m.yaml"]
    config = load_run(tiny_run, overrides)
    assert config.run_dir == f"{tmp_path}/x" and config.model == {"model_type": "llama"}
    assert [part.corpus for part in config.data.parts] == [f"{tmp_path}/data/a", "b$"]
    assert config.data.valid == {"web": f"{tmp_path}/data/v"}
    # What a run directory holds was replaced when the run began.
    folder = tmp_path / "$DATA"
    folder.mkdir()
    literal = config.model_copy(update={"data": config.data.model_copy(update={"valid": "/$X/v"})})
    (folder / "config.yaml").write_text(literal.to_yaml())
    again = load_run(folder)
    assert (again.run_dir, again.data.valid) == (str(folder), "/$X/v")


def test_the_published_config_of_tinyllama_is_the_preset(tiny_run, tmp_path):
    file = tmp_path / "tinyllama.json"
    file.write_text(TINYLLAMA_JSON)
    model = load_run(tiny_run, [f"model={file}"]).model
    preset = read_mapping(ROOT / "configs" / "model" / "tinyllama_1b.yaml", "preset")
    theirs, ours = (hf_config(section).to_dict() for section in (model, preset))
    # Of the first weights its code says more than its config.
    assert ours.pop("initializer_range") == pytest.approx(0.0140, abs=5e-5)
    assert theirs.pop("initializer_range") == 0.02 and theirs == ours


def test_an_exported_config_is_taken_as_it_is_from_its_folder(tiny_run, tmp_path):
    config = hf_config(load_run(tiny_run).model)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    written = json.loads(config.to_json_string())
    # What older readers need beside `rope_parameters`.
    older = {"rope_theta": 10000.0, "rope_scaling": None, "_name_or_path": "x"}
    (tmp_path / "config.json").write_text(json.dumps(written | older))
    found = hf_config(load_run(tiny_run, [f"model={tmp_path}"]).model).to_dict()
    assert found == hf_config(load_run(tiny_run).model).to_dict()
    with pytest.raises(UserError, match=r"config.json' does not exist"):
        load_run(tiny_run, [f"model={tmp_path.parent}"])


def test_a_run_that_is_not_named_or_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="RUN is empty"):
        load_run("")
    with pytest.raises(UserError, match="is no run directory: it holds no config.yaml"):
        load_run(Path(tmp_path))
