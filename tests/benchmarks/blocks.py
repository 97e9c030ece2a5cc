"""Time of a stack of blocks under a plan, against its FLOPs: one core, fp32, forward + backward.

    python tests/benchmarks/blocks.py [--family gpt2] [--hidden 512]

Target: at most 1.05 x the ratio of the FLOPs with attention scores, as torch computes them.
`blocks` counts the projections and the MLP alone.
"""

from __future__ import annotations

import argparse

import torch
from common import CASES, alternate, fixed_method, model_section, ratios, run_script, timed, verdict

from est_ds.config.arguments import positive
from est_ds.cost.flops import dense_flops, step_flops
from est_ds.plans.methods.base import plan_loads
from est_ds.slicing.build import build_model
from est_ds.slicing.families import family_of, hf_config
from est_ds.slicing.subnetwork import Subnetwork

MOST = 1.05
MORE_CASES = {"heads .5": (1.0, 0.5, 1.0), "full": (1.0, 1.0, 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="llama", choices=["llama", "gpt2"])
    parser.add_argument("--hidden", type=positive, default=512)
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--sequence", type=positive, default=512)
    parser.add_argument("--rounds", type=positive, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)

    section = model_section(options.family, options.hidden, options.layers, 1024, options.sequence)
    config = hf_config(section)
    family = family_of(config.model_type)
    shape = family.shape(config)
    model = build_model(config, seed=0)
    blocks = [p for p in family.pieces(config) if p.layer is not None]
    held = [[model.get_submodule(path) for path in piece.modules] for piece in blocks]
    subnetwork = Subnetwork(family, shape, dict(enumerate(family.layers(model))))
    x_BTH = torch.randn(options.batch, options.sequence, options.hidden)

    def pass_through() -> None:
        y = x_BTH.clone().requires_grad_()
        for piece, modules in zip(blocks, held):
            y = piece.forward(*modules, y)
        y.sum().backward()

    def dense(_: int) -> float:
        seconds = timed(pass_through)
        model.zero_grad(set_to_none=True)
        return seconds

    def sliced(method, round_: int) -> float:
        with subnetwork.active(method.plan(round_)):
            return dense(round_)

    cases = CASES | MORE_CASES
    methods = {name: fixed_method(kept, shape) for name, kept in cases.items()}
    variants = {
        name: lambda round_, method=method: sliced(method, round_)
        for name, method in methods.items()
    }
    times = alternate({"unsliced": dense} | variants, options.rounds)

    tokens = options.batch * options.sequence
    size = {"tokens": tokens, "sequence": options.sequence}
    head = 3 * 2 * tokens * shape.hidden * shape.vocabulary
    whole = dense_flops(shape, **size)
    print(f"{options.family}: {options.layers} layers, hidden {options.hidden}, {tokens} tokens")
    print(f"{'kept':26} {'time':>6} {'(min)':>7} {'blocks':>7} {'scores':>7} {'time / FLOPs':>13}")
    for name, method in methods.items():
        ratio, least = ratios(times[name], times["unsliced"])
        active = step_flops(shape, plan_loads(method.plan(1), shape), **size)
        flops = (active.model - head) / (whole.model - head)
        print(
            f"{name:26} {ratio:6.3f} ({least:5.3f}) {active.blocks / whole.blocks:7.3f} "
            f"{flops:7.3f} {ratio / flops:13.3f} {verdict(ratio / flops, MOST)}"
        )


if __name__ == "__main__":
    run_script(main)
