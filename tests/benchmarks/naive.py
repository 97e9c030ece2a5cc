"""Layers skipped by hand under ZeRO-3: sixty lines that train the wrong thing, beside est_ds.

    python tests/benchmarks/naive.py [--steps 150] [--zero 3]

Both train a small Llama from the same weights on the same batches, and skip the same layers. By
hand, a layer that is not drawn passes its input on. That computes the right loss and the right
gradients. But under ZeRO-3 DeepSpeed keeps the gradient of the last step in which a layer was
active, and applies it again in every step that skips the layer. The third column is one process of
plain torch, in which a skipped layer's gradient is zero: what both should be.
"""

from __future__ import annotations

import argparse

import torch
from common import model_section, random_batch, run_config, run_script, zero_engine
from torch.nn.functional import cross_entropy

from est_ds.config.arguments import positive
from est_ds.plans.methods import build_method
from est_ds.slicing.build import build_model
from est_ds.slicing.families import hf_config

VOCABULARY, SEQUENCE, BATCH, LR, LAYERS = 64, 32, 8, 1e-3, 8
SECTION = model_section("llama", 64, LAYERS, VOCABULARY, SEQUENCE)
ADAMW = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.0}


# By hand


def skip_by_hand(model: torch.nn.Module, kept: set[int]) -> None:
    """Has every layer look in `kept` whether it is drawn."""
    for number, layer in enumerate(model.model.layers):

        def forward(hidden, *args, number=number, original=layer.forward, **kwargs):
            return original(hidden, *args, **kwargs) if number in kept else hidden

        layer.forward = forward


def train_by_hand(batches: list, drawn: list[set[int]], zero: int) -> list[float]:
    """Losses of DeepSpeed's engine, its optimizer step and all."""
    import deepspeed

    model, kept = build_model(hf_config(SECTION), seed=0), set()
    skip_by_hand(model, kept)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), **ADAMW),
        config={
            "train_batch_size": BATCH,
            "zero_optimization": {"stage": zero},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
        },
    )
    losses = []
    for (ids, labels), layers in zip(batches, drawn):
        kept.clear()
        kept.update(layers)
        logits = engine(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


# What it should be, and est_ds


def train_plain(batches: list, drawn: list[set[int]]) -> list[float]:
    """Losses of one process of plain torch."""
    model, kept = build_model(hf_config(SECTION), seed=0), set()
    skip_by_hand(model, kept)
    optimizer, losses = torch.optim.AdamW(model.parameters(), **ADAMW), []
    for (ids, labels), layers in zip(batches, drawn):
        kept.clear()
        kept.update(layers)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        loss = cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_est_ds(batches: list, method: dict, zero: int) -> tuple[list[float], list[set[int]]]:
    """Losses of est_ds' engine, and the layers that its plans keep."""
    optimizer = {"lr": LR, "betas": [0.9, 0.95], "weight_decay": 0.0, "clip": 1.0}
    config = run_config(
        SECTION,
        BATCH,
        SEQUENCE,
        zero,
        method=method,
        steps=len(batches),
        optimizer=optimizer,
        schedule={"name": "cosine", "warmup": 0.0, "final": 1.0},
    )
    engine, shape = zero_engine(config)
    built = build_method(method, seed=0, steps=len(batches), shape=shape)
    losses, drawn = [], []
    for step, batch in enumerate(batches):
        plan = built.plan(step)
        with engine.subnetwork.active(plan):
            losses.append(float(engine.train_batch(iter([batch]))))
        drawn.append(set(plan.kept_layers))
    return losses, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=positive, default=150)
    parser.add_argument("--zero", type=int, default=3, choices=(0, 1, 2, 3))
    options = parser.parse_args()
    torch.set_num_threads(1)
    phases = [{"until": 1.0, "layers": 0.5}]
    method = {"name": "est", "phases": phases}
    batches = [learnable_batch(step) for step in range(options.steps)]
    ours, drawn = train_est_ds(batches, method, options.zero)
    columns = {
        "by hand": train_by_hand(batches, drawn, options.zero),
        "est_ds": ours,
        "plain torch": train_plain(batches, drawn),
    }
    print(f"ZeRO {options.zero}, {LAYERS} layers, half of them a step; loss, nats a token")
    print("step".rjust(6), *(name.rjust(12) for name in columns))
    for step in sorted({0, 1, 2, 5, 10, *range(24, options.steps, 25), options.steps - 1}):
        if step < options.steps:
            print(f"{step:6}", *(f"{losses[step]:12.6f}" for losses in columns.values()))
    plain = columns["plain torch"]
    for name in ("by hand", "est_ds"):
        apart = max(abs(a - b) / b for a, b in zip(columns[name], plain))
        print(f"{name}: at most {apart:.1e} from plain torch, relative")


def learnable_batch(step: int):
    """Ids that follow from the one before, mostly."""
    ids, _ = random_batch(BATCH, SEQUENCE, VOCABULARY, step)
    keep = torch.rand(BATCH, SEQUENCE, generator=torch.Generator().manual_seed(10**6 + step)) < 0.1
    for place in range(1, SEQUENCE):
        follows = (5 * ids[:, place - 1] + 3) % VOCABULARY
        ids[:, place] = torch.where(keep[:, place], ids[:, place], follows)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


if __name__ == "__main__":
    run_script(main)
