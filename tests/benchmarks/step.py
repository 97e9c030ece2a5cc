"""Time of a whole training step under a plan, against its `model` FLOPs: one core, fp32.

    python tests/benchmarks/step.py [--family gpt2] [--zero 0] [--hidden 512] [--micro 4]

The step is `train_batch` of the real engine on one process: embedding, head, loss, clipping and
AdamW included. Target: at most 1.10 x the ratio of the `model` FLOPs. `saved` is the time that the
plan saves over the FLOPs that it saves.
"""

from __future__ import annotations

import argparse

import torch
from common import (
    CASES,
    alternate,
    fixed_method,
    model_section,
    random_batch,
    ratios,
    run_config,
    run_script,
    timed,
    verdict,
    zero_engine,
)

from est_ds.config.arguments import positive
from est_ds.cost.flops import dense_flops, step_flops
from est_ds.plans.methods.base import plan_loads

MOST = 1.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="llama", choices=["llama", "gpt2"])
    parser.add_argument("--hidden", type=positive, default=512)
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--vocabulary", type=positive, default=4096)
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument(
        "--micro", type=positive, help="sequences of a micro-batch; all, if not given"
    )
    parser.add_argument("--sequence", type=positive, default=512)
    parser.add_argument("--zero", type=int, choices=range(4), default=1)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if options.batch % (options.micro or options.batch):
        parser.error(f"--micro {options.micro} does not divide --batch {options.batch}")
    torch.set_num_threads(1)

    section = model_section(
        options.family, options.hidden, options.layers, options.vocabulary, options.sequence
    )
    micro = options.micro or options.batch
    size = options.batch, options.sequence
    config = run_config(section, *size, options.zero, micro=micro, compile=options.compile)
    engine, shape = zero_engine(config)

    def step(method, round_: int) -> float:
        batch = random_batch(options.batch, options.sequence, options.vocabulary, round_)
        batches = zip(*(part.split(micro) for part in batch))
        with engine.subnetwork.active(method.plan(round_)):
            return timed(lambda: engine.train_batch(batches))

    methods = {name: fixed_method(kept, shape) for name, kept in CASES.items()}
    methods["full"] = fixed_method((1.0, 1.0, 1.0), shape)
    times = alternate(
        {
            name: lambda round_, method=method: step(method, round_)
            for name, method in methods.items()
        },
        options.rounds,
    )

    tokens = options.batch * options.sequence
    size = {"tokens": tokens, "sequence": options.sequence}
    whole = dense_flops(shape, **size).model
    print(
        f"{options.family}: {options.layers} layers, hidden {options.hidden}, vocabulary "
        f"{options.vocabulary}, {tokens} tokens, micro-batches of {micro}, ZeRO {options.zero}; "
        f"full step {min(times['full']):.3f} s"
    )
    print(f"{'kept':26} {'time':>6} {'(min)':>7} {'model':>7} {'saved':>6} {'time / FLOPs':>13}")
    for name in CASES:
        ratio, least = ratios(times[name], times["full"])
        flops = step_flops(shape, plan_loads(methods[name].plan(1), shape), **size).model / whole
        print(
            f"{name:26} {ratio:6.3f} ({least:5.3f}) {flops:7.3f} "
            f"{(1 - ratio) / (1 - flops):6.2f} {ratio / flops:13.3f} "
            f"{verdict(ratio / flops, MOST)}"
        )


if __name__ == "__main__":
    run_script(main)
