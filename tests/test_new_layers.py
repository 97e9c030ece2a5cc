"""Layers, and units, that begin late move by the learning rate, as at the start of a run."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import train
from est_ds.checkpoints.index import read_index
from est_ds.disk import describe
from est_ds.engine.optimizer import FreezingAdamW, GrowingAdamW

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-8, "fused": True}
BETAS = [(0.9, 0.95), (0.9, 0.999)]
BOUND = 1.2  # learning rates, root mean square over a parameter


def gradients(steps: int, n: int, kind: str) -> torch.Tensor:
    """[steps, n]: all the same (the worst case), or noise about it."""
    noise = torch.randn(steps, n, generator=torch.Generator().manual_seed(0))
    return torch.ones(steps, n) + (0 if kind == "constant" else noise)


def moves(parameter, optimizer, some, lr) -> list[float]:
    """Root mean squares of the last ten elements' updates, decay aside, over the learning rate."""
    found = []
    for gradient in some:
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
        update = (before * (1 - lr * SETTINGS["weight_decay"]) - parameter.detach())[-10:]
        found.append((update.square().mean().sqrt() / lr).item())
    return found


@pytest.mark.parametrize("kind", ["constant", "noisy"])
@pytest.mark.parametrize("betas", BETAS)
def test_500_steps_of_a_new_piece_move_it_by_at_most_the_rate(betas, kind):
    """Without a count of its own the worst is 6.57 rates at beta2 .999, and 1.10 at .95."""
    some = gradients(500, 20, kind)
    largest = {}
    for pieces in ([], [(0, 10, 0), (10, 10, 100_000)]):
        parameter = nn.Parameter(torch.ones(20))
        optimizer = GrowingAdamW([parameter], betas=betas, **SETTINGS)
        moves(parameter, optimizer, torch.ones(1, 20), 1e-3)  # makes the state
        optimizer.state[parameter]["step"].fill_(100_000)
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][key][10:] = 0
        optimizer.pieces = {parameter: pieces} if pieces else {}
        largest[bool(pieces)] = max(moves(parameter, optimizer, some, 1e-3))
    assert largest[True] <= BOUND
    if kind == "constant":
        assert largest[True] == pytest.approx(1.0, abs=1e-3)
        assert largest[False] == pytest.approx(6.57 if betas[1] == 0.999 else 1.10, abs=0.01)


@pytest.mark.parametrize("betas", [*BETAS, (0.0, 0.999)])
def test_elements_that_rest_equal_adamw_that_steps_each_by_itself(betas):
    """torch's AdamW leaves a parameter without a gradient as it is, and counts its steps apart."""
    some = gradients(300, 6, "noisy")
    active = torch.rand(some.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    active[:, 0], active[:200, 1] = True, False  # always, and late
    start = torch.linspace(-1, 1, 6)
    scalars = [nn.Parameter(value.clone()) for value in start]
    oracle = torch.optim.AdamW(scalars, betas=betas, **SETTINGS)
    whole = nn.Parameter(start.clone().view(2, 3))
    optimizer = FreezingAdamW([whole], betas=betas, **SETTINGS)
    for gradient in torch.where(active, some, 0):
        whole.grad = gradient.view(2, 3).clone()
        for scalar, value in zip(scalars, gradient):
            scalar.grad = value.clone() if value else None
        oracle.step()
        optimizer.step()
    assert whole.detach().flatten().tolist() == pytest.approx([s.item() for s in scalars], rel=1e-5)
    counts = optimizer.state[whole]["active_steps"].flatten().tolist()
    assert counts == active.sum(dim=0).tolist()


@pytest.mark.slow
def test_a_run_whose_elements_did_not_count_yet_goes_on(tiny_run, tmp_path):
    """With `freeze` as an earlier version saved it: every element is of the age of the run."""
    run_dir = tmp_path / "run"
    more = ("optimizer.inactive=freeze", "parallel.pipe=1", "parallel.zero=1")
    done = train(tiny_run, f"run_dir={run_dir}", *more, processes=1)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(run_dir / "checkpoints" / "step_00000020")
    checkpoint = run_dir / "checkpoints" / "step_00000015"
    (run_dir / "checkpoints" / "latest").write_text(f"{checkpoint.name}\n")
    file = checkpoint / "rank_00000.safetensors"
    held = {k: t for k, t in load_file(file).items() if not k.startswith("active_steps:")}
    save_file(held, file)
    index = read_index(checkpoint).model_copy(update={"files": {file.name: describe(file)}})
    (checkpoint / "checkpoint.json").write_text(index.to_json())
    resumed = train(run_dir, processes=1)
    assert resumed.returncode == 0, resumed.stderr
    last = load_file(run_dir / "checkpoints" / "step_00000020" / file.name)
    counts = torch.cat([t for k, t in last.items() if k.startswith("active_steps:")])
    assert (counts.min(), counts.max()) == (15.0, 20.0)


def record_moves(file: Path) -> None:
    """Writes how far every parameter that began late moves in every step, over the rate."""
    step = GrowingAdamW.step

    @torch.no_grad()
    def measured(self, closure=None):
        old = [
            (group, flat, piece, flat.detach().view(-1).clone())
            for group in self.param_groups
            for flat in group["params"]
            for piece in self.pieces.get(flat, ())
            if piece[2]
        ]
        step(self, closure)
        with file.with_suffix(f".{torch.distributed.get_rank()}").open("a") as out:
            for group, flat, (offset, length, began), before in old:
                part = slice(offset, offset + length)
                before = before[part] * (1 - group["lr"] * group["weight_decay"])
                move = (before - flat.detach().view(-1)[part]).square().mean().sqrt() / group["lr"]
                line = [int(self.state[flat]["step"]) - began, length, move.item()]
                out.write(json.dumps(line) + "\n")

    GrowingAdamW.step = measured


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "processes", "beta2"),
    [
        (("parallel.pipe=1", "parallel.zero=0"), 1, 0.95),
        (("parallel.pipe=1", "parallel.zero=0"), 1, 0.999),
        (("parallel.zero=1",), 4, 0.999),
        (("parallel.pipe=1", "parallel.zero=3", "parallel.offload=true"), 2, 0.999),
        (("parallel.pipe=1", "parallel.zero=2", "precision=bf16"), 2, 0.999),
    ],
    ids=["1 process, .95", "1 process", "pipe 2 x data 2", "ZeRO 3, offload", "ZeRO 2, bf16"],
)
def test_500_steps_of_new_layers_move_them_by_at_most_the_rate(
    layout, processes, beta2, tiny_run, tmp_path
):
    phases = "[{until: 150, layers: 1}, {until: 650, layers: 4}]"
    done = train(
        tiny_run,
        f"run_dir={tmp_path}/run",
        *layout,
        "steps=650",
        f"method={{name: stacking, mode: random, balance_groups: 2, phases: {phases}}}",
        f"optimizer.betas=[0.9, {beta2}]",
        *("checkpoint.every=650", "evaluate.every=650", "log.every=50"),
        *("batch.global=4", "evaluate.sequences=2"),
        processes=processes,
        timeout=1200,
        first=partial(record_moves, tmp_path / "moves"),
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for f in tmp_path.glob("moves.*") for x in f.open()]
    assert {age for age, *_ in lines} == set(range(1, 501))
    largest = max(move for *_, move in lines)
    print(f"beta2 {beta2}, {' '.join(layout)}: at most {largest:.3f} learning rates")
    assert largest <= BOUND
