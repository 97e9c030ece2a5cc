"""What matrix products alone allow: their time at sliced sizes, against their FLOPs; one core.

    python tests/benchmarks/products.py [--hidden 256] [--tokens 1024]

Forward and both backward products of every projection of a Llama layer, and of the output head,
at the sizes that half of the heads and columns leave, over those of the whole layer. No code around
them can save more of these products' time than that. `saved` as step.py has it: the time saved over
the FLOPs saved, of a step in which all else takes no time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import alternate, ratios, run_script, timed
from torch import Tensor

from est_ds.config.arguments import positive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=positive, default=256)
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--vocabulary", type=positive, default=4096)
    parser.add_argument("--tokens", type=positive, default=1024, help="of a micro-batch")
    parser.add_argument("--rounds", type=positive, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)

    hidden, heads = options.hidden, max(2, options.hidden // 64)
    columns = hidden * 11 // 4
    cases = {
        "whole": (heads, columns),
        "heads, columns .5": (heads // 2, columns // 2),
        "heads .5": (heads // 2, columns),
        "columns .5": (heads, columns // 2),
    }
    shapes = {name: projections(hidden, *kept) for name, kept in cases.items()}
    head = (hidden, options.vocabulary)
    layers = {n: [p for p in found for _ in range(options.layers)] for n, found in shapes.items()}
    runs = {n: products(options.tokens, [*found, head]) for n, found in layers.items()}
    times = alternate({n: lambda _, run=run: timed(run) for n, run in runs.items()}, options.rounds)
    flops = {n: sum(a * b for a, b in [*found, head]) for n, found in layers.items()}
    print(f"hidden {hidden}, {options.layers} layers, {options.tokens} tokens")
    print(f"{'kept':18} {'time':>6} {'(min)':>7} {'FLOPs':>6} {'saved':>6} {'GFLOP/s':>8}")
    for name in cases:
        ratio, least = ratios(times[name], times["whole"])
        part = flops[name] / flops["whole"]
        saved = f"{(1 - ratio) / (1 - part):6.2f}" if part < 1 else " " * 6
        rate = 6e-9 * options.tokens * flops[name] / min(times[name])
        print(f"{name:18} {ratio:6.3f} ({least:5.3f}) {part:6.3f} {saved} {rate:8.1f}")


def projections(hidden: int, heads: int, columns: int) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's projections, heads of 64 and two to a key/value head."""
    queries, keys = heads * 64, heads * 32
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    return [*attention, (hidden, columns), (hidden, columns), (columns, hidden)]


def products(tokens: int, shapes: list[tuple[int, int]]) -> Callable[[], None]:
    """Makes the operands once; what it returns multiplies them as forward and backward do."""
    operands: list[tuple[Tensor, Tensor, Tensor]] = [
        (torch.randn(tokens, a), torch.randn(b, a), torch.randn(tokens, b)) for a, b in shapes
    ]

    def run() -> None:
        for x, weight, grad in operands:
            x @ weight.t()
            grad @ weight
            grad.t() @ x

    return run


if __name__ == "__main__":
    run_script(main)
