"""Head and loss without the logits against head, logits and loss: time on one core, and memory.

    python tests/benchmarks/head.py [--vocabulary 151936] [--bf16]

Forward and backward of the output head and the loss. `torch` is its own `linear_cross_entropy`, in
chunks. Memory is the most that weight, what reads it, loss and gradients take together: of the
real sizes, without the memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import alternate, ratios, run_script, timed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

from est_ds.config.arguments import positive
from est_ds.data.objectives.loss import mean_loss, token_loss
from est_ds.engine.head import summed_loss

sys.path.append(str(Path(__file__).resolve().parents[1]))

from live_bytes import LiveBytes

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def of_logits(x_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    return token_loss(linear(x_NH, weight_VH)[None], labels_N[None])


def of_est_ds(x_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    return mean_loss(summed_loss(x_NH, weight_VH, None, labels_N)[0], labels_N)


def of_torch(x_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(x_NH, weight_VH, labels_N, options=options)


def peak_bytes(loss: Loss, sizes: tuple[int, int, int], dtype: torch.dtype) -> int:
    tokens, vocabulary, hidden = sizes
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.empty(tokens, hidden, dtype=dtype, requires_grad=True)
        weight = torch.empty(vocabulary, hidden, dtype=dtype, requires_grad=True)
        loss(x, weight, torch.zeros(tokens, dtype=torch.int64)).backward()
    return live.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=positive, default=1024, help="for the time")
    parser.add_argument("--vocabulary", type=positive, default=4096)
    parser.add_argument("--hidden", type=positive, default=256)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=positive, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    sizes = options.tokens, options.vocabulary, options.hidden

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.tokens, options.hidden, generator=generator).to(dtype)
    weight = torch.randn(options.vocabulary, options.hidden, generator=generator).to(dtype)
    labels = torch.randint(options.vocabulary, (options.tokens,), generator=generator)
    weight.mul_(options.hidden**-0.5)

    def step(loss: Loss) -> float:
        own = x.detach().requires_grad_(), weight.detach().requires_grad_()
        return timed(lambda: loss(*own, labels).backward())

    losses: dict[str, Loss] = {"logits": of_logits, "est_ds": of_est_ds, "torch": of_torch}
    variants = {name: lambda _, loss=loss: step(loss) for name, loss in losses.items()}
    times = alternate(variants, options.rounds)
    tokens, vocabulary, hidden = sizes
    print(f"{tokens} tokens, vocabulary {vocabulary}, hidden {hidden}, {dtype}")
    for name in losses:
        ratio, least = ratios(times[name], times["logits"])
        print(f"{name:8} {min(times[name]):7.3f} s  {ratio:5.2f} ({least:.2f}) of the logits' time")
    large = 4096, 151_936, 1024
    whole, fused = (peak_bytes(losses[name], large, dtype) for name in ("logits", "est_ds"))
    print(
        f"memory of 4096 tokens, vocabulary 151936, hidden 1024: {whole / 2**30:.2f} GiB with "
        f"logits, {fused / 2**30:.2f} GiB without, {fused / whole:.2f}"
    )


if __name__ == "__main__":
    run_script(main)
