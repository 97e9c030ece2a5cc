"""Documents apart: each document's attention by itself, over masked attention; on one core.

    python tests/benchmarks/documents.py [--equal] [--documents 32] [--family gpt2]

Attention alone, forward and backward, and `train_batch` of the real engine on one process. Every
sequence holds so many documents, of random lengths unless they are equal. Predicted is, of the
attention, the scores that are computed: of a document half its square, of short neighbours that
share a call the whole. Of the step that share of the scores' part of its `model` FLOPs, and all
else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import (
    alternate,
    model_section,
    random_batch,
    ratios,
    run_config,
    run_script,
    timed,
    zero_engine,
)
from torch import Tensor

from est_ds.config.arguments import positive
from est_ds.cost.flops import dense_flops
from est_ds.slicing.documents import NAME, Documents, attention, numbers_of

WAYS = {"masked": "sdpa", "apart": NAME}


def positions(options: argparse.Namespace, seed: int) -> Tensor:
    """Of ids in their documents, int64 [batch, sequence]."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(options.batch):
        inner = np.arange(1, options.documents) * options.sequence // options.documents
        if not options.equal:
            places = np.arange(1, options.sequence)
            inner = np.sort(rng.choice(places, options.documents - 1, replace=False))
        lengths = np.diff([0, *inner, options.sequence])
        rows.append(np.concatenate([np.arange(n) for n in lengths]))
    return torch.from_numpy(np.stack(rows))


def computed(positions_BT: Tensor) -> float:
    """The scores that are computed, over all."""
    stretches = Documents(numbers_of(positions_BT)[:, 0, :, 0]).stretches
    scores = sum(sum(s) ** 2 / (1 if len(s) > 1 else 2) for s in stretches)
    return scores / positions_BT.numel() / positions_BT.shape[1]


def of_attention(options: argparse.Namespace) -> Callable[[str, int], float]:
    heads, width = max(2, options.hidden // 64), 64
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    shape = options.batch, options.sequence, heads, width

    def run(way: str, round_: int) -> float:
        generator = torch.Generator().manual_seed(round_)
        q, k, v, after = (torch.randn(shape, generator=generator) for _ in range(4))
        states = [x.transpose(1, 2).requires_grad_() for x in (q, k, v)]
        positions_BT = positions(options, round_)
        mask = number = numbers_of(positions_BT)
        if way == "masked":
            own = torch.ones(options.sequence, options.sequence, dtype=torch.bool).tril()
            mask = own & (number == number.transpose(2, 3))
        return timed(lambda: attention(module, *states, mask)[0].backward(after))

    return run


def of_step(options: argparse.Namespace) -> tuple[Callable[[str, int], float], float, float]:
    """A step's time, the scores' part of its FLOPs, and how far the two ways' losses are apart."""
    size = options.hidden, options.layers, options.vocabulary, options.sequence
    data: dict[str, Any] = dict.fromkeys(("train", "valid", "tokenizer"), "unset")
    data |= {"sequence": options.sequence, "documents": "separate"}
    section = model_section(options.family, *size)
    engine, shape = zero_engine(
        run_config(section, options.batch, options.sequence, options.zero, data=data)
    )
    model = engine.deepspeed.module
    assert model.config._attn_implementation == NAME
    plan = engine.design.method.plan(0)
    tokens = options.batch * options.sequence
    sizes = ({"tokens": tokens, "sequence": length} for length in (0, options.sequence))
    without, whole = (dense_flops(shape, **size).model for size in sizes)

    def batch(round_: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        ids, labels = random_batch(options.batch, options.sequence, options.vocabulary, round_)
        return (ids, positions(options, round_)), labels

    def run(way: str, round_: int) -> float:
        model.set_attn_implementation(WAYS[way])
        with engine.subnetwork.active(plan):
            return timed(lambda: engine.train_batch(iter([batch(round_)])))

    losses = []
    for implementation in WAYS.values():
        model.set_attn_implementation(implementation)
        losses.append(engine.mean_loss([batch(0)]))
    return run, 1 - without / whole, abs(losses[1] / losses[0] - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="llama", choices=["llama", "gpt2"])
    parser.add_argument("--hidden", type=positive, default=512)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--vocabulary", type=positive, default=4096)
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--sequence", type=positive, default=2048)
    parser.add_argument("--documents", type=positive, default=8)
    parser.add_argument("--equal", action="store_true", help="documents of one length")
    parser.add_argument("--zero", type=int, choices=range(4), default=1)
    parser.add_argument("--rounds", type=positive, default=5)
    options = parser.parse_args()
    if options.documents > options.sequence:
        parser.error(f"--documents {options.documents} is more than --sequence {options.sequence}")
    torch.set_num_threads(1)

    scores = [computed(positions(options, round_)) for round_ in range(1, options.rounds + 1)]
    left = float(np.median(scores))
    step, share, difference = of_step(options)
    print(
        f"{options.family}: {options.layers} layers, hidden {options.hidden}, {options.batch} x "
        f"{options.sequence} tokens, {options.documents} documents in each; losses differ by "
        f"{difference:.1e}"
    )
    for what, run, predicted in (
        ("attention", of_attention(options), left),
        ("whole step", step, 1 - share * (1 - left)),
    ):
        variants = {way: lambda round_, way=way: run(way, round_) for way in WAYS}
        times = alternate(variants, options.rounds)
        ratio, least = ratios(times["apart"], times["masked"])
        print(
            f"{what:10}  masked {min(times['masked']):.4f} s, apart {ratio:.3f} ({least:.3f}) of "
            f"it, predicted {predicted:.3f}"
        )


if __name__ == "__main__":
    run_script(main)
