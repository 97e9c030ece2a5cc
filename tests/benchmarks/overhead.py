"""What est_ds costs a dense step, and what drawing a plan costs: one core.

    python tests/benchmarks/overhead.py [--hidden 256] [--rounds 40]

Target: a dense step (forward, backward, AdamW) with slicing installed and a full plan active takes
at most 1 % more than of the same model before; a plan of TinyLlama-1.1B is drawn in 2 ms.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from common import alternate, model_section, random_batch, ratios, run_script, timed, verdict
from torch.nn.functional import cross_entropy

from est_ds.config.arguments import positive
from est_ds.config.run_file import load_run
from est_ds.plans.methods import build_method
from est_ds.slicing.build import build_model
from est_ds.slicing.families import family_of, hf_config
from est_ds.slicing.subnetwork import Subnetwork

ROOT = Path(__file__).resolve().parents[2]
MOST_OF_STEP, MOST_MS = 1.01, 2.0


def dense_step(options: argparse.Namespace) -> None:
    section = model_section("llama", options.hidden, options.layers, 4096, options.sequence)
    config = hf_config(section)
    family = family_of(config.model_type)
    shape = family.shape(config)
    model = build_model(config, seed=0)
    layers = dict(enumerate(family.layers(model)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    whole = build_method({"name": "full"}, seed=0, steps=1, shape=shape).plan(0)
    ids, labels = random_batch(options.batch, options.sequence, 4096, seed=0)

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False).logits
        cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step_under_plan(subnetwork: Subnetwork) -> None:
        with subnetwork.active(whole):
            step()

    def with_est_ds(_: int) -> float:
        subnetwork = Subnetwork(family, shape, layers)
        seconds = timed(lambda: step_under_plan(subnetwork))
        subnetwork.uninstall()
        return seconds

    names = ("unmodified", "est_ds", "unmodified again")
    unmodified = lambda _: timed(step)  # noqa: E731
    times = alternate(dict(zip(names, (unmodified, with_est_ds, unmodified))), options.rounds)
    ratio, least = ratios(times["est_ds"], times["unmodified"])
    noise, _ = ratios(times["unmodified again"], times["unmodified"])
    print(
        f"dense step, hidden {options.hidden}, {options.batch * options.sequence} tokens, "
        f"{min(times['unmodified']) * 1e3:.0f} ms: est_ds {ratio:.4f} (min {least:.4f}; "
        f"the unmodified model against itself {noise:.4f}) {verdict(ratio, MOST_OF_STEP)}"
    )


def drawing(run_file: str, draws: int) -> None:
    config = load_run(ROOT / run_file)
    hf = hf_config(config.model)
    shape = family_of(hf.model_type).shape(hf)
    method = build_method(config.method, seed=0, steps=config.steps, shape=shape)
    for phase in method.phases:
        steps = range(phase.from_step, min(phase.from_step + draws, phase.until_step))
        plain = statistics.median(timed(lambda: method.plan(step)) for step in steps) * 1e3
        named = statistics.median(timed(lambda: method.plan(step).digest) for step in steps) * 1e3
        print(
            f"plan of {run_file}, phase {phase.name}: {plain:.2f} ms, with its digest "
            f"{named:.2f} ms {verdict(named, MOST_MS)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=positive, default=256)
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--sequence", type=positive, default=256)
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument("--draws", type=positive, default=200)
    parser.add_argument("--run", default="configs/run/est_tinyllama.yaml")
    options = parser.parse_args()
    torch.set_num_threads(1)
    drawing(options.run, options.draws)
    dense_step(options)


if __name__ == "__main__":
    run_script(main)
