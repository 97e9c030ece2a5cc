"""What every layout must equal: one process of plain torch with torch's AdamW."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from est_ds.config.sections import RunConfig
from est_ds.data.objectives.loss import token_loss
from est_ds.plans.lr import learning_rate
from est_ds.run.prepare import prepare
from est_ds.slicing.build import build_model
from est_ds.slicing.subnetwork import Subnetwork


@dataclass
class Reference:
    """Losses and gradient norms by step, held-out losses by step, and the trained model."""

    losses: list[float]
    norms: list[float]
    held_out: dict[int, float]
    model: nn.Module


def plain_adamw(config: RunConfig, left_out: Collection[int] = ()) -> Reference:
    """Trains a run without DeepSpeed; inactive parameters have zero gradients.

    Under precision bf16 the model computes in bf16 with the same fp32 buffers, gradients of the
    micro-batches are added in fp32, and AdamW steps fp32 weights, from which bf16 ones are taken.

    Args:
        left_out: steps that are not trained.
    """
    torch.set_num_threads(1)
    run = prepare(config, 1)
    model = build_model(run.hf_config, config.seed)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    parameters = list(model.parameters())
    masters = [nn.Parameter(p.detach().float()) for p in parameters]
    subnetwork = Subnetwork(
        run.family, run.method.shape, dict(enumerate(run.family.layers(model)))
    )
    decay = config.optimizer.weight_decay
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in masters if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in masters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=config.optimizer.betas,
    )
    found = Reference([], [], {}, model)
    for step in range(config.steps):
        if step in left_out:
            continue
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.optimizer.lr, step, config.steps)
        for master in masters:
            master.grad = torch.zeros_like(master)
        micro_batches = list(
            run.train.micro_batches(step, rank=0, world=1, micro=config.batch.micro)
        )
        total = 0.0
        with subnetwork.active(run.method.plan(step)):
            for ids, labels in micro_batches:
                loss = token_loss(model(input_ids=ids).logits, labels) / len(micro_batches)
                loss.backward()
                total += loss.item()
                for parameter, master in zip(parameters, masters):
                    if parameter.grad is not None:
                        master.grad += parameter.grad.float()
                        parameter.grad = None
        found.norms.append(nn.utils.clip_grad_norm_(masters, config.optimizer.clip).item())
        idle = [(m, m.grad == 0, m.detach().clone()) for m in masters]
        moments = {m: {k: t.clone() for k, t in optimizer.state[m].items()} for m in masters}
        optimizer.step()
        if config.optimizer.inactive == "freeze":
            for master, rests, before in idle:
                master.data = torch.where(rests, before, master.data)
                for key in ("exp_avg", "exp_avg_sq"):
                    now = optimizer.state[master]
                    then = moments[master].get(key, torch.zeros_like(before))
                    now[key] = torch.where(rests, then, now[key])
        with torch.no_grad():
            for parameter, master in zip(parameters, masters):
                parameter.copy_(master)
        found.losses.append(total)
        if (step + 1) % config.evaluate.every == 0:
            count = config.evaluate.sequences
            [(ids, labels)] = run.valid["valid"].held_out(count, rank=0, world=1, micro=count)
            with torch.no_grad():
                found.held_out[step] = token_loss(model(input_ids=ids).logits, labels).item()
    return found


def assert_close(found: list[float], expected: list[float], within: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for step, (a, b) in enumerate(zip(found, expected)):
        assert abs(a - b) <= within * abs(b), f"step {step}: {a} against {b}"
