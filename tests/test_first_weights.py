"""The first weights by `model.init`, and which weights decay."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cases.families import CASES
from cases.tiny import TINY_MODEL
from conftest import ROOT, refused
from est_ds.checkpoints.reader import WEIGHT, Checkpoint
from est_ds.config.run_file import load_run
from est_ds.config.sections import Optimizer
from est_ds.design import Design, make_design
from est_ds.engine.optimizer import adamw
from est_ds.run.metrics import read_metrics
from est_ds.slicing.build import build_model, embedding_names, empty_model
from est_ds.slicing.families import hf_config
from est_ds.slicing.families.fields import Init
from layouts import train_in
from reference import assert_close
from workers import train_all

WIDE = TINY_MODEL | {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 997}
FAMILIES = {  # models of 4 layers of width 128, and the projections into the residual stream
    "llama": (WIDE, ("o_proj", "down_proj")),
    "gpt2": (
        {
            "model_type": "gpt2", "vocab_size": 997, "n_embd": 128, "n_head": 4, "n_layer": 4,
            "n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        },
        ("c_proj",),
    ),
    "bert": (
        {
            "model_type": "bert", "vocab_size": 997, "hidden_size": 128, "num_attention_heads": 4,
            "num_hidden_layers": 4, "intermediate_size": 352, "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        ("attention.output.dense", "output.dense"),
    ),
}  # fmt: skip


def design_of(run, model: dict, **init) -> Design:
    config = load_run(run)
    section = {**model, "init": init} if init else model
    objective = {"name": "mlm"} if model["model_type"] == "bert" else {"name": "causal"}
    update = {"model": section, "objective": objective, "method": {"name": "full"}}
    return make_design(config.model_copy(update=update))


def drawn(design: Design, paths=("",)) -> torch.nn.Module:
    model = empty_model(design.hf_config)
    design.draw(model, paths)
    return model


# Standard deviations of embeddings and linears, and of projections into the residual stream.
WIDTHS = [
    ({"residual": "tinyllama"}, math.sqrt(2 / 5 / 128), 1 / math.sqrt(128) / 4),
    ({"residual": "tinyllama", "std": 0.05}, 0.05, 1 / math.sqrt(128) / 4),
    ({"residual": "gpt2", "std": 0.03}, 0.03, 0.03 / math.sqrt(8)),
    ({"residual": "none"}, 0.02, 0.02),
]


@pytest.mark.parametrize(("init", "std", "residual"), WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_as_wide_as_the_rule_says(family, init, std, residual, tiny_run):
    model, projections = FAMILIES[family]
    for name, tensor in drawn(design_of(tiny_run, model, **init)).named_parameters():
        if tensor.ndim < 2:
            assert tensor.unique().numel() == 1, name  # norms one, biases zero
            continue
        wide = residual if name.removesuffix(".weight").endswith(projections) else std
        error = 5 / math.sqrt(2 * tensor.numel())
        assert tensor.std().item() == pytest.approx(wide, rel=error), name


def test_tinyllama_has_the_widths_of_its_code():
    design = make_design(load_run(ROOT / "configs" / "run" / "est_tinyllama.yaml"))
    assert design.hf_config.initializer_range == pytest.approx(0.013975, abs=1e-6)
    model = empty_model(design.hf_config)
    path = "model.layers.21.mlp.down_proj"
    design.draw(model, [path])
    assert model.get_parameter(f"{path}.weight").std().item() == pytest.approx(0.0010, abs=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_that_a_process_draws_are_those_of_the_whole_model(family, tiny_run):
    """A pipe stage draws pieces, ZeRO 3 modules, growth a layer."""
    design = design_of(tiny_run, FAMILIES[family][0], residual="tinyllama")
    whole = dict(drawn(design).named_parameters())
    pieces = [path for piece in design.family.pieces(design.hf_config) for path in piece.modules]
    for paths in (pieces, pieces[::-1], pieces[2:3]):
        found = drawn(design, paths)
        for path in paths:
            for name, tensor in found.get_submodule(path).named_parameters():
                common = f"{path}.{name}"
                if common in whole:
                    assert torch.equal(tensor, whole[common]), common


def test_without_init_the_weights_are_those_of_before(tiny_run):
    design = design_of(tiny_run, WIDE)
    plain = build_model(design.hf_config, load_run(tiny_run).seed).state_dict()
    for name, tensor in drawn(design).state_dict().items():
        assert torch.equal(tensor, plain[name])
    # What has another width is the same draw, wider.
    scaled = drawn(design_of(tiny_run, WIDE, residual="gpt2")).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(scaled[name] * math.sqrt(8), plain[name])


INITS = ["optimizer.lr=1e-2", "steps=2", "method={name: full}", "model.init={residual: tinyllama}"]


@pytest.mark.slow
def test_every_layout_begins_with_the_same_weights(synthetic_run, tmp_path):
    names = ("1 process", "data 2, ZeRO 3", "pipe 2 x data 2, ZeRO 1")
    runs = train_in(tmp_path, synthetic_run, [(name, "init", INITS) for name in names])
    losses = [[line["loss"] for line in read_metrics(run)[0]] for run in runs]
    assert_close(losses[1], losses[0])
    assert_close(losses[2], losses[0])


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("model.init={}", ["model.init sets nothing"]),
        ("model.init=0.02", ["model.init=0.02", "{std: NUMBER"]),
        ("model.init={std: 0}", ["model.init.std=0"]),
        ("model.init={std: 2}", ["model.init.std=2", "less than or equal to 1"]),
        ("model.init={residual: deepnet}", ["model.init.residual='deepnet'", "tinyllama"]),
        ("model.init={stdev: 1.0}", ["unknown key 'model.init.stdev'"]),
        ("optimizer={lr: 1.0, weight_decay: 0, decay: all}", ["decay=all has no effect"]),
        ("optimizer.decay=norms", ["optimizer.decay='norms'"]),
    ],
)
def test_what_cannot_take_effect_is_refused(model, named, tiny_run, tmp_path, capsys):
    error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path}/run", model)
    assert all(text in error for text in named), error


def test_two_names_for_one_width_and_t5_are_refused(tiny_run, tmp_path, capsys):
    twice = ["model.initializer_range=0.1", "model.init={std: 0.2}"]
    error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path}/run", *twice)
    assert "model.init.std=0.2 and model.initializer_range=0.1 are the same" in error
    t5 = {**CASES["t5"].section, "init": {"residual": "gpt2"}}
    error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path}/run", f"model={t5}")
    assert "model.init does not work with model_type 't5'" in error


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("gpt2", {"transformer.wte.weight", "transformer.wpe.weight"}),  # and the head, tied
        ("gpt2_untied", {"transformer.wte.weight", "transformer.wpe.weight"}),
        ("qwen3", {"model.embed_tokens.weight"}),
    ],
)
def test_embeddings_are_known_by_name(case, names):
    model = build_model(hf_config(CASES[case].section), seed=0)
    assert embedding_names(model) == names
    named = dict(model.named_parameters())
    settings = Optimizer(lr=1.0, weight_decay=0.5, decay="no_embeddings")
    decaying, others = adamw(model.parameters(), settings, [named[n] for n in names]).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    expected = {id(p) for n, p in named.items() if p.ndim > 1 and n not in names}
    assert {id(p) for p in decaying["params"]} == expected


@pytest.mark.slow
def test_tied_embeddings_in_two_pipe_stages_decay_alike(synthetic_run, tmp_path):
    model = str({**FAMILIES["gpt2"][0], "vocab_size": 512}).replace("'", "")
    overrides = [
        f"model={model}",
        "method={name: full}",
        "steps=4",
        "optimizer.decay=no_embeddings",
    ]
    names = ("1 process", "pipe 2, ZeRO 0", "data 2, ZeRO 3")
    runs = train_in(tmp_path, synthetic_run, [(name, "tied", overrides) for name in names])
    losses = [[line["loss"] for line in read_metrics(run)[0]] for run in runs]
    assert_close(losses[1], losses[0])
    assert_close(losses[2], losses[0])


def test_weight_decay_is_of_the_parameters_that_it_says(tiny_run, tmp_path):
    """One step: the gradients are the same, so that weights differ by lr x decay x weight."""
    short = ["parallel={}", "steps=1", "method={name: full}", "schedule={name: wsd, warmup: 0}"]
    short += ["optimizer={lr: 0.01, weight_decay: 0.5}", "schedule.decay=0"]
    jobs = [
        {"run": tiny_run, "overrides": [f"run_dir={tmp_path}/{d}", *short, f"optimizer.decay={d}"]}
        for d in ("matrices", "all", "no_embeddings")
    ]
    train_all(tmp_path / "ranks", 1, jobs)
    config = load_run(tmp_path / "all")
    first = dict(build_model(make_design(config).hf_config, config.seed).named_parameters())
    found = {}
    for decay in ("matrices", "all", "no_embeddings"):
        with Checkpoint(tmp_path / decay / "checkpoints" / "step_00000001") as one:
            found[decay] = {n: one.read(n, WEIGHT, 0, w.numel()) for n, w in first.items()}
    for name, weight in first.items():
        decayed = 0.01 * 0.5 * weight.detach().flatten()
        none = name == "model.embed_tokens.weight"
        for other, sign in (("all", -1 * (weight.ndim < 2)), ("no_embeddings", 1 * none)):
            apart = found[other][name] - found["matrices"][name]
            # Or one float32, where neighbours are farther apart: at the norms' weights of 1.
            wrong = (apart - sign * decayed).abs()
            spacing = torch.from_numpy(np.spacing(found[other][name].abs().numpy()))
            assert (wrong <= 1e-4 * abs(sign) * decayed.abs() + spacing.clamp(min=1e-7)).all(), name


def test_a_family_without_one_width_for_all_draws_by_its_own():
    assert Init().residual_std(hf_config({"model_type": "t5"})) is None
