"""The config.json of published models, as they are on the Hub, are model sections."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from conftest import refused
from est_ds.config.published import of_training
from est_ds.config.run_file import read_sections
from est_ds.slicing.build import count_parameters, empty_model
from est_ds.slicing.families import hf_config

FOLDER = Path(__file__).parent / "cases" / "published"
# Parameters, as the models' pages on the Hub count them; of BERT and T5 with the output head tied.
PARAMETERS = {
    "tinyllama_1b1": 1_100_048_384,
    "llama2_7b": 6_738_415_616,
    "llama32_1b": 1_235_814_400,
    "mistral_7b": 7_241_732_096,
    "qwen25_0b5": 494_032_768,
    "qwen3_0b6": 596_049_920,
    "gpt2": 124_439_808,
    "bert_base": 109_514_298,
    "t5_small": 60_506_624,
    "mamba_130m": 129_135_360,
}


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("whole_folder", [False, True])
def test_published_config_gives_the_published_model(name, whole_folder, tmp_path):
    """Every field has the value that the library gives it, read from the same file."""
    shutil.copyfile(FOLDER / f"{name}.json", tmp_path / "config.json")
    tree = {"model": "." if whole_folder else "config.json"}
    read_sections(tree, tmp_path)
    config = hf_config(tree["model"])
    theirs = of_training(AutoConfig.from_pretrained(tmp_path).to_dict())
    idle = theirs.keys() - config.to_dict().keys()
    assert idle <= {"pretraining_tp", "position_embedding_type", "use_mrope"}
    ours = of_training(config.to_dict())
    assert ours == {k: v for k, v in theirs.items() if k not in idle}
    assert count_parameters(empty_model(config)) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("qwen25_0b5", {"use_mrope": True}, "model.use_mrope=True is not supported"),
        ("llama2_7b", {"pretraining_tp": 2}, "model.pretraining_tp=2 is not supported"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "model.reorder_and_upcast_attn=True is not"),
        ("llama2_7b", {"rope_scaling": {"type": "ntk"}}, "rope_type='ntk' is not known"),
        ("bert_base", {"position_embedding_type": "relative_key"}, "='relative_key' is not"),
        ("llama2_7b", {"quantization_config": {"bits": 4}}, "model.quantization_config"),
        ("mistral_7b", {"n_positions": 4096}, "model.n_positions"),
        ("t5_small", {"max_position_embeddings": 512}, "model.max_position_embeddings"),
    ],
)
def test_what_changes_the_function_and_cannot_be_honoured_is_named(
    name, changes, named, tiny_run, tmp_path, capsys
):
    config = json.loads((FOLDER / f"{name}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert named in refused(capsys, "plan", tiny_run, f"model={tmp_path}/config.json")
