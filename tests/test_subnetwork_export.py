"""An exported subnetwork is a smaller Hugging Face model that computes what its plan computes."""

from __future__ import annotations

import json
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers

from cases.families import (
    CASES,
    WITHOUT_ATTENTION,
    config_of,
    draw_plan,
    every_case,
    inputs_of,
    installed,
    library_model_of,
    masked_step,
    our_model,
    shape_of,
)
from est_ds import cli
from est_ds.errors import UserError
from est_ds.export.part import Keep, plan_to_keep
from est_ds.export.smaller import smaller_model
from est_ds.plans.methods import build_method
from est_ds.slicing.families import family_of

FULL = {"name": "full"}
WITHOUT_HEADS = ("gpt2", "bert", *WITHOUT_ATTENTION)
COLUMNS = "0-4,9,30-35"
OF_FOUR_GROUPS = "0-2,12,15,20,24-26,36,40,47"


def method_of(case, section=FULL, steps=10):
    return build_method(section, seed=0, steps=steps, shape=shape_of(case))


def extracted(case, plan):
    """The smaller model's config, and the model itself as the library builds it from that."""
    family = family_of(case.section["model_type"])
    small, weights = smaller_model(our_model(case), family, config_of(case), plan)
    with TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        rebuilt = type(small).from_pretrained(folder)
    return small, library_model_of(case, rebuilt, weights).eval()


def cuts_heads(case) -> bool:
    return case.section["model_type"] not in WITHOUT_HEADS


@every_case
@pytest.mark.parametrize("dropped", [0, 2], ids=["without the first layer", "with it"])
def test_smaller_model_computes_what_masks_on_the_library_s_model_compute(case, dropped):
    layers = ",".join(str(i) for i in range(shape_of(case).num_layers) if i % 3 != dropped)
    heads = "0,2,3,5,6,8,9,11" if cuts_heads(case) else None
    columns = OF_FOUR_GROUPS if case is CASES["mamba2_groups"] else COLUMNS
    plan = plan_to_keep(Keep(layers, heads, columns), method_of(case), 10)
    _, small = extracted(case, plan)
    with torch.no_grad():
        logits = small(**inputs_of(case)).logits
    torch.testing.assert_close(logits, masked_step(case, plan).logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), installed(case, whole := our_model(case).eval()).active(plan):
        torch.testing.assert_close(logits, whole(**inputs_of(case)).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama_biases_tied", "mistral_window", "qwen2", "qwen3"])
@pytest.mark.parametrize("rule", ["within_groups", "groups"])
def test_plan_with_other_heads_in_every_layer_and_a_layer_scale_is_exported(name, rule):
    case = CASES[name]
    plan = draw_plan(shape_of(case), skipped=(1,), heads=2, columns=11, rule=rule, scale=1.5)
    small, model = extracted(case, plan)
    assert small.num_hidden_layers == 3 and small.intermediate_size == 11
    assert (small.num_attention_heads, small.num_key_value_heads) == (
        (8, 4) if rule == "within_groups" else (6, 2)
    )
    with torch.no_grad():
        logits = model(**inputs_of(case)).logits
    torch.testing.assert_close(logits, masked_step(case, plan).logits, rtol=1e-5, atol=1e-5)


def test_window_goes_with_its_layer():
    case = CASES["qwen2"]
    case = type(case)(
        {**case.section, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        case.layers,
    )
    plan = plan_to_keep(Keep(layers="0,3"), method_of(case), 10)
    small, model = extracted(case, plan)
    assert small.layer_types == ["full_attention", "sliding_attention"]
    with torch.no_grad(), installed(case, whole := our_model(case).eval()).active(plan):
        expected = whole(**inputs_of(case)).logits
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs_of(case)).logits, expected, rtol=1e-6, atol=1e-6)


REFUSED = {
    "gpt2 heads": ("gpt2", Keep(heads="0-5"), ["heads cannot be", "n_embd / n_head", "--layers"]),
    "bert heads": ("bert", Keep(heads="0-5"), ["heads cannot be cut", "hidden_size", "--columns"]),
    "uneven groups": ("llama", Keep(heads="0,1,3"), ["2 of K/V head 0, 1 of K/V head 1"]),
    "heads that do not divide the width": ("llama_mha", Keep(heads="0-4"), ["24", "5"]),
    "no such layer": ("llama", Keep(layers="0-4"), ["--layers=0-4", "0 to 3"]),
    "no range": ("llama", Keep(columns="9-2"), ["--columns=9-2", "0 to 36"]),
    "no number": ("llama", Keep(heads="first"), ["--heads=first", "'first'"]),
    "everything": ("llama", Keep(layers="0-3"), ["--layers=0-3 keeps the whole model"]),
    "plan of a full step": ("llama", Keep(plan_step=3), ["--plan-step=3 keeps the whole model"]),
    "plan of no step": ("llama", Keep(plan_step=10), ["--plan-step=10", "0 to 9"]),
    "plan and layers": ("llama", Keep(layers="1", plan_step=3), ["--plan-step", "leave --layers"]),
    "channels of no width": ("mamba2", Keep(columns="0-12"), ["13 columns", "a multiple of 12"]),
    "uneven groups of columns": ("mamba2_groups", Keep(columns="0-11"), ["model.n_groups"]),
    "heads without attention": ("mamba", Keep(heads="0-3"), ["--heads", "'mamba'", "--columns"]),
    "no decoder": ("t5", Keep(layers="0-3"), ["decoder (4-7)"]),
}


@pytest.mark.parametrize(("name", "keep", "named"), REFUSED.values(), ids=REFUSED)
def test_part_that_cannot_be_a_model_is_refused(name, keep, named):
    case = CASES[name]
    with pytest.raises(UserError) as e:
        extracted(case, plan_to_keep(keep, method_of(case), 10))
    assert all(text in str(e.value) for text in named), e.value


@pytest.mark.parametrize(
    ("name", "counts", "named"),
    [
        ("llama", dict(without=((1, 0),)), "skips the attention"),
        ("t5", dict(heads=2), "one position bias"),
    ],
)
def test_plan_that_cannot_be_a_model_is_refused(name, counts, named):
    case = CASES[name]
    with pytest.raises(UserError, match=named):
        extracted(case, draw_plan(shape_of(case), **counts))


def test_layers_that_have_not_grown_yet_are_refused():
    case = CASES["llama"]
    phases = [{"until": 0.5, "layers": 2}, {"until": 1.0, "layers": 4}]
    method = method_of(case, {"name": "stacking", "phases": phases})
    assert plan_to_keep(Keep(layers="1"), method, 5).kept_layers == (1,)
    with pytest.raises(UserError, match=r"layers \[2\].*has grown to \[0, 1\]"):
        plan_to_keep(Keep(layers="0,2"), method, 5)


@pytest.mark.parametrize(
    ("arguments", "step", "size"),
    [
        (["--plan-step", "0"], 20, (2, 4, 4, 48)),
        (["--layers", "0-2", "--heads", "0,2,4,6", "--columns", "0-9"], 20, (3, 4, 4, 10)),
        (["--layers", "3", "--checkpoint", "10"], 10, (1, 8, 4, 96)),
    ],
)
def test_part_of_a_trained_run_is_exported(arguments, step, size, trained, tmp_path):
    """The command itself compares the folder's logits with those of the full model."""
    cli.main(["export", str(trained), "--out", str(tmp_path / "hf"), *arguments])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    heads = (model.config.num_attention_heads, model.config.num_key_value_heads)
    assert (model.config.num_hidden_layers, *heads, model.config.intermediate_size) == size
    mark = json.loads((tmp_path / "hf" / "est_ds_export.json").read_text())
    assert mark["largest_difference"] <= 1e-5 and mark["step"] == step


def test_part_that_cannot_be_exported_leaves_nothing(trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["export", str(trained), "--out", str(tmp_path / "hf"), "--heads", "0,2,3"])
    assert e.value.code == 2 and "K/V head" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
