"""Growing depth: the real engines equal real shallow models that are grown by hand."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

from cases.tiny import TINY_MODEL
from conftest import est_ds, train
from est_ds.config.run_file import load_run
from est_ds.data.loader import Portion
from est_ds.data.objectives.loss import token_loss
from est_ds.errors import UserError
from est_ds.plans.lr import learning_rate
from est_ds.plans.methods import build_method
from est_ds.plans.methods.stacking import sources
from est_ds.run.metrics import read_metrics
from est_ds.run.prepare import prepare
from est_ds.slicing.build import build_model
from est_ds.slicing.families import family_of, hf_config
from reference import step_active

FREEZE = "optimizer.inactive=freeze"
# mode, moments, depths at steps 0-5, 6-11, 12-17; overrides and processes of the layout
CASES = {
    "gradual, pipe 2, ZeRO 1": ("gradual", "copy", (2, 3, 4), ("parallel.zero=1",), 2),
    "midas, pipe 2, ZeRO 0": ("midas", "copy", (2, 3, 4), ("parallel.zero=0",), 2),
    "double, fresh moments, data 2, ZeRO 2": (
        *("double", "fresh", (1, 2, 4)),
        *(("parallel.pipe=1", "parallel.zero=2"), 2),
    ),
    "random from no layer, pipe 2 x data 2, ZeRO 1": (
        *("random", "copy", (0, 1, 4)),
        *(("parallel.zero=1",), 4),
    ),
    "random from no layer, 1 process": (
        *("random", "copy", (0, 2, 4)),
        *(("parallel.pipe=1", "parallel.zero=0"), 1),
    ),
    "identity, data 2, ZeRO 3": (
        *("identity", "copy", (1, 2, 4)),
        *(("parallel.pipe=1", "parallel.zero=3"), 2),
    ),
    "random, freeze, data 2, ZeRO 3, offload": (
        *("random", "copy", (1, 2, 4)),
        *(("parallel.pipe=1", "parallel.zero=3", "parallel.offload=true", FREEZE), 2),
    ),
    "double, fresh moments, freeze, pipe 2, ZeRO 1": (
        *("double", "fresh", (1, 2, 4)),
        *(("parallel.zero=1", FREEZE), 2),
    ),
}
SLOW = [name for name in CASES if "1 process" in name or "freeze" in name]


def arguments(mode: str, moments: str, depths: tuple[int, ...]) -> list[str]:
    phases = [f"{{until: {6 * (i + 1)}, layers: {d}}}" for i, d in enumerate(depths)]
    method = f"{{name: stacking, mode: {mode}, phases: [{', '.join(phases)}], balance_groups: 2"
    return [
        "steps=18",
        f"method={method}{', moments: fresh' if moments == 'fresh' else ''}}}",
        "checkpoint.every=6",
        "evaluate.every=6",
    ]


def shallow(config, whole, places):
    """A Hugging Face model as deep as `places`, with the weights of these layers of `whole`."""
    section = {**config.model, "num_hidden_layers": len(places)}
    model = build_model(hf_config({**section}), seed=0) if places else None
    if model is None:  # Hugging Face refuses nothing here, but a model needs a layer to build
        model = build_model(hf_config({**section, "num_hidden_layers": 1}), seed=0)
        model.model.layers = torch.nn.ModuleList()
        model.config.num_hidden_layers = 0
    state = whole.state_dict()
    for name, parameter in model.state_dict().items():
        if name.startswith("model.layers."):
            _, _, i, rest = name.split(".", 3)
            name = f"model.layers.{places[int(i)]}.{rest}"
        parameter.copy_(state[name])
    return model


def optimizer_of(model):
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )


def grow(config, model, optimizer, whole, mode, moments, places):
    """The grown model and its optimizer, layer by layer in plain torch.

    A parameter whose moments begin at zero counts its steps from there.
    """
    old_layers = list(model.model.layers)
    taken = sources(mode, len(old_layers), len(places))
    grown = shallow(config, whole, places)
    bigger = optimizer_of(grown)
    pairs = [(model.model.embed_tokens, grown.model.embed_tokens)]
    pairs += [(model.model.norm, grown.model.norm), (model.lm_head, grown.lm_head)]
    for i, source in enumerate(taken):
        layer = grown.model.layers[i]
        if source is None and mode == "identity":
            with torch.no_grad():
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        pairs.append((None if source is None else old_layers[source], layer))
    for i, (old, new) in enumerate(pairs):
        copied = i >= 3 and taken[i - 3] in taken[: i - 3]
        for name, parameter in new.named_parameters():
            state = {"step": torch.tensor(0.0)}
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter)
            if old is not None:
                before = old.get_parameter(name)
                parameter.data.copy_(before.data)
                if not (copied and moments == "fresh"):
                    state |= {k: v.clone() for k, v in optimizer.state[before].items()}
            bigger.state[parameter] = state
    return grown, bigger


def reference(config, run, mode, moments, depths):
    whole = build_model(run.hf_config, config.seed)
    places = run.method.places
    model = shallow(config, whole, places[0])
    optimizer = optimizer_of(model)
    losses, held_out = [], []
    for step in range(config.steps):
        if step in (6, 12):
            at = places[step // 6]
            model, optimizer = grow(config, model, optimizer, whole, mode, moments, at)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.optimizer.lr, step, config.steps)
        optimizer.zero_grad()
        [(ids, labels)] = run.train.micro_batches(step, Portion(0, 1, micro=8))
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids, use_cache=False).logits.flatten(0, 1), labels.flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if config.optimizer.inactive == "freeze":
            step_active(optimizer)
        else:
            optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 6 == 0:
            [(ids, labels)] = run.valid["valid"].held_out(10, Portion(0, 1, micro=10))
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
            held_out.append(token_loss(logits, labels).item())
    return losses, held_out


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES]
)
def test_growing_run_equals_models_grown_by_hand(case, tiny_run, tmp_path):
    torch.set_num_threads(1)
    mode, moments, depths, layout, processes = CASES[case]
    run_dir = tmp_path / "run"
    overrides = [*arguments(mode, moments, depths), f"run_dir={run_dir}", *layout]
    config = load_run(tiny_run, overrides)
    losses, held_out = reference(config, prepare(config, processes), mode, moments, depths)

    done = train(tiny_run, *overrides, processes=processes)
    assert done.returncode == 0, done.stderr
    steps, evaluations = read_metrics(run_dir)
    assert [e["kept_layers"] for e in steps] == [d for d in depths for _ in range(6)]
    assert [e["loss"] for e in steps] == pytest.approx(losses, rel=1e-5)
    assert [e["eval_loss"] for e in evaluations] == pytest.approx(held_out, rel=1e-5)
    assert [e["eval_layers"] for e in evaluations] == list(depths)
    assert f"step 6: held-out loss of the model at depth {depths[0]} of 4 " in done.stdout
    assert "step 18: held-out loss of the full model " in done.stdout

    # A crash at the second boundary: the growth is done again from the checkpoint before it, and
    # the layer that began at the first one goes on counting.
    if processes == 4:
        again = shutil.copytree(run_dir, tmp_path / "again")
        shutil.rmtree(again / "checkpoints" / "step_00000018")
        (again / "checkpoints" / "latest").write_text("step_00000012\n")
        exported = est_ds("export", again)
        assert exported.returncode == 0, exported.stderr
        assert json.loads((again / "export" / "config.json").read_text())["num_hidden_layers"] == 1
        resumed = train(again, processes=4)
        assert resumed.returncode == 0, resumed.stderr
        assert [e["loss"] for e in read_metrics(again)[0]] == [e["loss"] for e in steps]


@pytest.mark.slow
@pytest.mark.parametrize("inactive", ["zero_grad", "freeze"])
def test_new_layers_go_on_counting_in_another_layout(inactive, tiny_run, tmp_path):
    """Layers began at steps 6 and 12; the run goes on from a checkpoint at step 15."""
    begun = tmp_path / "pipeline"
    overrides = arguments("random", "copy", (1, 2, 4))
    overrides += ["checkpoint.every=3", f"optimizer.inactive={inactive}", "optimizer.lr=1e-2"]
    overrides += ["optimizer.betas=[0.9, 0.999]"]
    done = train(tiny_run, f"run_dir={begun}", *overrides, processes=4)
    assert done.returncode == 0, done.stderr
    losses = [e["loss"] for e in read_metrics(begun)[0]]
    for zero, processes in ((0, 1), (2, 2), (3, 2)):
        again = shutil.copytree(begun, tmp_path / f"zero_{zero}")
        shutil.rmtree(again / "checkpoints" / "step_00000018")
        (again / "checkpoints" / "latest").write_text("step_00000015\n")
        layout = ("parallel.pipe=1", f"parallel.zero={zero}")
        resumed = train(again, *layout, processes=processes)
        assert resumed.returncode == 0, resumed.stderr
        assert [e["loss"] for e in read_metrics(again)[0]] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "before", "expected"),
    [
        ("double", 2, "0 1 0 1"),
        ("double", 3, "0 1 2 0 1 2"),
        ("double", 1, "0 0 0 0"),
        ("interleave", 2, "0 0 1 1"),
        ("interleave", 3, "0 0 0 1 1 1 2 2 2"),
        ("gradual", 4, "0 1 2 3 2 3"),
        # Block ceil(n / 2) of n equal ones: 1 of 2, 2 of 4, 1 of 2, 2 of 4.
        ("midas", 6, "0 1 2  0 1 2  3 4 5"),
        ("midas", 12, "0 1 2 3 4 5  3 4 5  6 7 8 9 10 11"),
        ("midas", 8, "0 1 2 3  0 1 2 3  4 5 6 7"),
        ("midas", 16, "0 1 2 3 4 5 6 7  4 5 6 7  8 9 10 11 12 13 14 15"),
        # Odd numbers of blocks: 1 of 1, 2 of 3, 3 of 5.
        ("midas", 3, "0 1 2  0 1 2"),
        ("midas", 3, "0 1  1  2"),
        ("midas", 9, "0 1 2 3 4 5  3 4 5  6 7 8"),
        ("midas", 5, "0 1 2  2  3 4"),
        ("lidas", 4, "0 1 2  1 2  3"),
        ("lidas", 6, "0 1 2 3  1 2 3  4 5"),
        ("random", 1, "0 - -"),
        ("identity", 0, "- -"),
    ],
)
def test_sources_are_those_of_the_papers(mode, before, expected):
    layers = [None if word == "-" else int(word) for word in expected.split()]
    assert sources(mode, before, len(layers)) == layers


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"phases": [{"until": 5, "layers": 2}, {"until": 18, "layers": 3}]}, "whole model; use 4"),
        ({"phases": [{"until": 5, "layers": 4}, {"until": 18, "layers": 4}]}, "must grow"),
        ({"phases": [{"until": 5, "layers": 1}, {"until": 18, "layers": 4}]}, "at most 2"),
        (
            {"mode": "double", "phases": [{"until": 5, "layers": 3}, {"until": 18, "layers": 4}]},
            "multiple of 3",
        ),
        ({"phases": [{"until": 5, "layers": 0}, {"until": 18, "layers": 4}]}, "mode random"),
        (
            {"mode": "random", "phases": [{"until": 5, "layers": 0.1}, {"until": 18, "layers": 4}]},
            r"phases\[0\].layers=0.1 keeps none of 4 layers .* at least 0.25",
        ),
        (
            {"alpha": 10, "phases": [{"layers": 2}, {"layers": 4}, {"layers": 4}]},
            "method.alpha=10 gives a phase no step of steps=18; lower",
        ),
        (
            {"mode": "midas", "phases": [{"until": 5, "layers": 1}, {"until": 18, "layers": 4}]},
            "1 layers are no blocks of 3; add a divisor of 1: use 2",
        ),
        ({"mode": "fresh", "phases": []}, "`random` .* or `identity` "),
        (
            {
                "mode": "random",
                "moments": "fresh",
                "phases": [{"until": 5, "layers": 0}, {"until": 18, "layers": 4}],
            },
            "method.moments",
        ),
    ],
)
def test_growth_that_cannot_be_is_refused(changes, named):
    shape = family_of("llama").shape(hf_config(copy.deepcopy(TINY_MODEL)))
    with pytest.raises(UserError, match=named):
        build_method({"name": "stacking", **changes}, seed=0, steps=18, shape=shape)
