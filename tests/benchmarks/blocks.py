"""Time of a stack of blocks under a plan, against its FLOPs: one core, fp32, forward + backward.

    OMP_NUM_THREADS=1 python tests/benchmarks/blocks.py [--family llama] [--hidden 512]

Dense and sliced steps alternate within one run; ratios are of medians. `blocks` counts the
projections and the MLP; `with scores` adds the attention scores, as torch computes them.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from est_ds.flops import dense_flops, step_flops
from est_ds.model import build_model
from est_ds.plans.methods import build_method
from est_ds.plans.methods.base import plan_loads
from est_ds.slicing.families import family_of, hf_config
from est_ds.slicing.subnetwork import Subnetwork

CASES = {
    (0.5, 0.5, 0.5): "layers, heads, columns .5",
    (1.0, 0.5, 0.5): "heads, columns .5",
    (0.5, 1.0, 1.0): "layers .5",
    (1.0, 1.0, 0.5): "columns .5",
    (1.0, 0.5, 1.0): "heads .5",
    (1.0, 1.0, 1.0): "full (est_ds installed)",
}


def config_of(family: str, hidden: int, layers: int) -> dict:
    heads = hidden // 64
    if family == "gpt2":
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        return dict(model_type="gpt2", n_embd=hidden, n_layer=layers, n_head=heads, **dropout)
    return dict(
        model_type="llama",
        vocab_size=1024,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        intermediate_size=hidden * 11 // 4,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="llama", choices=["llama", "gpt2"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)

    config = hf_config(config_of(options.family, options.hidden, options.layers))
    family = family_of(config.model_type)
    shape = family.shape(config)
    model = build_model(config, seed=0)
    blocks = [p for p in family.pieces(config) if p.layer is not None]
    held = [[model.get_submodule(path) for path in piece.modules] for piece in blocks]
    subnetwork = Subnetwork(family, shape, dict(enumerate(family.layers(model))))
    x_BTH = torch.randn(options.batch, options.sequence, options.hidden)

    def step() -> float:
        x = x_BTH.clone().requires_grad_()
        began = time.perf_counter()
        y = x
        for piece, modules in zip(blocks, held):
            y = piece.forward(*modules, y)
        y.sum().backward()
        taken = time.perf_counter() - began
        model.zero_grad(set_to_none=True)
        return taken

    tokens = options.batch * options.sequence
    size = {"tokens": tokens, "sequence": options.sequence}
    head = 3 * 2 * tokens * shape.hidden * shape.vocabulary
    dense = dense_flops(shape, **size)
    print(f"{options.family}: {options.layers} layers, hidden {options.hidden}, {tokens} tokens")
    print(f"{'kept':28} {'time':>6} {'blocks':>7} {'with scores':>11} {'time / blocks':>13}")
    for (layers, heads, columns), name in CASES.items():
        phase = {"until": 1.0, "layers": layers, "heads": heads, "columns": columns}
        method = build_method(
            {"name": "est", "phases": [phase]}, seed=0, steps=100, shape=shape
        )
        times: tuple[list[float], list[float]] = ([], [])
        for repeat in range(options.repeats + 1):
            plan = method.plan(repeat)
            dense_s = step()
            with subnetwork.active(plan):
                sliced_s = step()
            if repeat:  # the first warms up
                times[0].append(dense_s)
                times[1].append(sliced_s)
        ratio = statistics.median(times[1]) / statistics.median(times[0])
        active = step_flops(shape, plan_loads(plan, shape), **size)
        of_blocks = active.blocks / dense.blocks
        with_scores = (active.model - head) / (dense.model - head)
        print(
            f"{name:28} {ratio:6.3f} {of_blocks:7.3f} {with_scores:11.3f} {ratio / of_blocks:13.3f}"
        )


if __name__ == "__main__":
    main()
