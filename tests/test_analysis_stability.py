"""Norms, Psi and losses without a layer: worked out by hand, and by models that lack the layer."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from conftest import refused
from est_ds import cli
from est_ds.analysis.linear import LAYERS, Settings, expected, measure_linear, run_network
from est_ds.analysis.results import stability_result
from est_ds.analysis.stability import measure, numbers_of, stacks_of
from subjects import BERT, GPT2, LLAMA, MAMBA, T5, plain_losses, subject_of

DEPTH = 5


def numbers(subject):
    return numbers_of(measure(subject), stacks_of(subject.design.method.shape))


# linear networks


def eye(factor: float = 1.0) -> list[np.ndarray]:
    return [factor * np.eye(2)] * DEPTH


POINTS = np.array([[1.0, 0.0], [0.6, 0.8]])


def test_equal_layers_with_residual_and_norm_add_one_each():
    found = run_network(eye(), POINTS, LAYERS["residual and norm"])
    np.testing.assert_allclose(found.norms, [1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(found.psi, [1, 1, 1, 1, 1])
    np.testing.assert_allclose(found.relative, [1 / 6] * DEPTH)


def test_without_a_norm_a_layer_is_as_large_as_all_that_it_reads():
    found = run_network(eye(0.5), POINTS, LAYERS["residual alone"])
    np.testing.assert_allclose(found.norms, 1.5 ** np.arange(6))
    np.testing.assert_allclose(found.psi, [1.5**5 - 1.5**4] * DEPTH)  # F - F_-l
    np.testing.assert_allclose(found.relative, [1 / 3] * DEPTH)


def test_without_residual_connections_a_turn_is_missing_in_full():
    """Every layer turns by an angle: without one the state lacks a turn, and the norm stays 1."""
    c, s = np.cos(0.7), np.sin(0.7)
    found = run_network([np.array([[c, -s], [s, c]])] * DEPTH, POINTS, LAYERS["norm alone"])
    np.testing.assert_allclose(found.norms, [1] * 6)
    np.testing.assert_allclose(found.psi, [2 * np.sin(0.35)] * DEPTH)


def test_every_layer_has_its_own_psi():
    """The second layer alone adds something: 3 x what it reads."""
    matrices = [np.zeros((2, 2)), 3 * np.eye(2), np.zeros((2, 2))]
    found = run_network(matrices, POINTS, LAYERS["residual alone"])
    np.testing.assert_allclose(found.psi, [0, 3, 0])
    np.testing.assert_allclose(found.norms, [1, 1, 4, 4])


def test_rates_are_those_of_the_limits():
    found = measure_linear(Settings(depths=(8, 16, 32), taus=(0.0, 1.0), samples=40))
    by_key = {(n["layers"], n["tau"]): n for n in found["networks"]}
    for (name, tau), network in by_key.items():
        known = [expected(name, tau, depth) for depth in found["depths"]]
        assert network["expected"] == known
        if tau == 0:
            np.testing.assert_allclose(network["mean_psi_over_norm"], known, rtol=0.15)
    assert by_key["residual and norm", 1.0]["rate"] == pytest.approx(-1.0, abs=0.1)
    assert by_key["residual and norm", 0.0]["rate"] == pytest.approx(-0.36, abs=0.1)
    for tau in (0.0, 1.0):
        assert by_key["residual alone", tau]["rate"] == pytest.approx(0.0, abs=0.1)
        norms = np.array(by_key["residual and norm", 0.0]["norms"])
        np.testing.assert_allclose(norms, np.sqrt(np.arange(33) + 1), rtol=0.15)


def test_linear_command_needs_no_run(tmp_path, capsys):
    few = ("--depths", "2,4", "--taus", "0")
    cli.main(["analyse", "linear", "--out", str(tmp_path / "a"), "--json", *few])
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "a" / "linear.json").read_text())
    assert said["depths"] == [2, 4] and len(said["networks"]) == 3
    assert (tmp_path / "a" / "linear.png").is_file()
    refusal = refused(capsys, "analyse", "linear", "--depths", "4", "--out", tmp_path / "b")
    assert "--depths=4 is not allowed: a rate needs two depths" in refusal
    (tmp_path / "c").write_text("")
    refusal = refused(capsys, "analyse", "linear", "--out", tmp_path / "c" / "d", *few)
    assert "cannot be written" in refusal
    assert not (tmp_path / "b").exists()


# models


@torch.no_grad()
def test_layers_that_add_nothing_have_no_psi_and_no_gap():
    subject = subject_of(LLAMA)
    for layer in subject.model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    found = numbers(subject)
    words = subject.model.model.embed_tokens.weight
    ids = torch.cat([batch.named["input_ids"] for batch in subject.batches])
    norm = words[ids].norm(dim=-1).mean().item()
    stack = found["stacks"]["model"]
    assert stack["norms"] == pytest.approx([norm] * 3)
    for layer in stack["layers"]:
        assert layer["psi"] == layer["gap"] == layer["psi_over_norm"] == 0
        assert layer["psi_over_first"] is None
    assert found["gap"]["mean"] == 0
    assert json.loads(stability_result({**EMPTY, **found}).json)["gap"]["mean"] == 0


EMPTY = {"step": 0, "windows": 1, "boundaries": [], "seconds": 0.0}


@torch.no_grad()
def test_layers_that_add_a_constant_have_its_norm_as_psi():
    subject = subject_of(GPT2)
    blocks, words = subject.model.transformer.h, subject.model.transformer
    for block, size in zip(blocks, (3.0, 4.0)):
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        block.mlp.c_proj.bias[2] = size
    found = numbers(subject)
    layers = found["stacks"]["model"]["layers"]
    assert [layer["psi"] for layer in layers] == pytest.approx([3.0, 4.0])
    assert [layer["psi_over_first"] for layer in layers] == pytest.approx([1.0, 4 / 3])
    ids = torch.cat([batch.named["input_ids"] for batch in subject.batches])
    states = words.wte.weight[ids] + words.wpe.weight[: ids.shape[1]]
    norms = []
    for added in (0.0, 3.0, 4.0):
        states[..., 2] += added
        norms.append(states.norm(dim=-1).mean().item())
    assert found["stacks"]["model"]["norms"] == pytest.approx(norms)
    relative = 4 / states.norm(dim=-1)
    assert layers[1]["psi_over_norm"] == pytest.approx(relative.mean().item())


def _cut(holder: nn.Module, name: str, place: int) -> nn.ModuleList:
    whole = getattr(holder, name)
    setattr(holder, name, nn.ModuleList(m for i, m in enumerate(whole) if i != place))
    return whole


# Where the layers are, the number of the first in the plan, and the module that reads the last
# state.
STREAMS = {
    "llama": (LLAMA, [("model", "layers", 0, "model.norm")]),
    "gpt2": (GPT2, [("transformer", "h", 0, "transformer.ln_f")]),
    "bert": (BERT, [("bert.encoder", "layer", 0, "cls")]),
    "mamba": (MAMBA, [("backbone", "layers", 0, "backbone.norm_f")]),
    "t5": (
        T5,
        [
            ("encoder", "block", 0, "encoder.final_layer_norm"),
            ("decoder", "block", 3, "decoder.final_layer_norm"),
        ],
    ),
}


@pytest.mark.parametrize("family", STREAMS)
def test_a_skipped_layer_is_one_that_the_librarys_model_does_not_have(family):
    section, streams = STREAMS[family]
    subject = subject_of(section)
    found = numbers(subject)
    full = plain_losses(subject)
    assert found["loss"] == pytest.approx(full.mean().item(), rel=1e-5)
    stacks = found["stacks"].values()
    for stack, (holder, name, first, reader) in zip(stacks, streams, strict=True):
        holder = subject.model.get_submodule(holder)
        whole = _states(subject, reader)
        assert len(stack["layers"]) == len(getattr(holder, name))
        for place, layer in enumerate(stack["layers"]):
            assert layer["layer"] == first + place
            if family == "t5" and place == 0:
                continue  # holds the position bias of the others
            modules = _cut(holder, name, place)
            without, states = plain_losses(subject), _states(subject, reader)
            setattr(holder, name, modules)
            psi = (states - whole).norm(dim=-1)
            assert layer["psi"] == pytest.approx(psi.mean().item(), rel=1e-4)
            relative = (psi / whole.norm(dim=-1)).mean().item()
            assert layer["psi_over_norm"] == pytest.approx(relative, rel=1e-4)
            assert layer["loss_without"] == pytest.approx(without.mean().item(), rel=1e-5)
            gaps = full - without
            assert layer["gap"] == pytest.approx(gaps.mean().item(), rel=1e-3)
            error = (gaps.std() / len(gaps) ** 0.5).item()
            assert layer["gap_error"] == pytest.approx(error, rel=1e-3)


def _states(subject, reader: str) -> torch.Tensor:
    """What a module reads, over all windows."""
    states = []
    module = subject.model.get_submodule(reader)
    hook = module.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    plain_losses(subject)
    hook.remove()
    return torch.cat(states)


# runs


def test_command_shows_the_gap_and_what_the_run_recorded_at_boundaries(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    cli.main(["analyse", "stability", str(run), "--windows", "3"])
    assert "recorded no losses at phase boundaries" in capsys.readouterr().out
    sides = [
        {"step": 8, "boundary": side, "phase": phase, "full_loss": full, "subnetwork_loss": sub}
        for side, phase, full, sub in (
            ("before", "small", 6.0, 6.5),
            ("after", "narrow", 6.0, 6.25),
        )
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(side) + "\n" for side in sides)
    cli.main(["analyse", "stability", str(run), "--windows", "3", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["boundaries"] == sides
    assert (
        "Boundary before step 8, small to narrow: subnetworks' loss 6.5000 to 6.2500"
        in " ".join(said["said"])
    )
    layers = said["stacks"]["model"]["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1, 2, 3]
    mean = np.mean([layer["loss_without"] for layer in layers])
    assert said["gap"]["mean"] == pytest.approx(said["loss"] - mean)
    assert said == json.loads((run / "analysis" / "stability_step_00000020.json").read_text())
    assert (run / "analysis" / "stability_step_00000020.png").is_file()
