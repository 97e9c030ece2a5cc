"""Dense training with est_ds against other loops over the same model, in tokens/s: fp32, CPU.

    python tests/benchmarks/dense.py            # bare PyTorch, est_ds, Trainer, Trainer with ZeRO 1
    python tests/benchmarks/dense.py --litgpt   # litgpt too; installs it beside .venv

Every contender is a process of its own that makes one step at a time, in turns. Target: est_ds
(method full) at least 1.00 x the tokens/s of the best of the others from 2,048 tokens a step on,
and at least 0.97 x with fewer. The rate of a matrix product is measured in the same turns; the last
column is the `model` FLOPs of the steps over it. litgpt goes into build/litgpt without its
dependencies, and runs on this environment's torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from common import alternate, model_section, ratios, run_script, timed, verdict
from gate import Contender

from est_ds.config.arguments import positive
from est_ds.cost.flops import dense_flops
from est_ds.slicing.families import family_of, hf_config

HERE = Path(__file__).resolve().parent
LITGPT = HERE.parents[1] / "build" / "litgpt"
PACKAGES = (
    "litgpt==0.5.13",
    "lightning==2.6.6",
    "lightning-utilities==0.15.3",
    "torchmetrics==1.9.0",
    "jsonargparse==4.53.0",
    "docstring-parser==0.18.0",
    "typeshed-client==2.14.0",
)
PEERS = ("bare", "trainer", "trainer_zero1", "litgpt_bare", "litgpt_fit")
MOST, MOST_OF_SMALL, SMALL = 1 / 1.00, 1 / 0.97, 2048
SQUARE = 1024  # the matrices whose product shows the machine's rate


def install_litgpt() -> None:
    if (LITGPT / "litgpt").is_dir():
        return
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", LITGPT]
    subprocess.run([*install, *PACKAGES], check=True)


def json_section(text: str) -> dict:
    """A section `deepspeed` as JSON."""
    found = json.loads(text)  # of an error argparse says which value it was
    if not isinstance(found, dict):
        raise ValueError
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=positive, default=256)
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--vocabulary", type=positive, default=4096)
    parser.add_argument("--batch", type=positive, nargs="+", default=[2, 8, 32])
    parser.add_argument("--sequence", type=positive, default=256)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--litgpt", action="store_true")
    parser.add_argument("--deepspeed", type=json_section, default={}, help="est_ds's section, JSON")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    size = options.hidden, options.layers, options.vocabulary, options.sequence
    model_section("llama", *size)  # says what is wrong of them, before others start
    names = ["bare", "est_ds_zero0", "est_ds_zero1", "trainer", "trainer_zero1"]
    if options.litgpt:
        install_litgpt()
        names += ["litgpt_bare", "litgpt_fit"]
    for batch in options.batch:
        times = measure(names, dict(vars(options), batch=batch))
        show(times, batch, options)


def measure(names: list[str], options: dict) -> dict[str, list[float]]:
    """Seconds of the contenders' steps, and of a matrix product beside them (`product`)."""
    contenders = {}
    for name in names:
        path = str(LITGPT) if name.startswith("litgpt") else ""
        environment = {"OMP_NUM_THREADS": str(options["threads"]), "PYTHONPATH": path}
        command = [HERE / "contenders.py", name, json.dumps(options)]
        contenders[name] = Contender(command, environment)
    # The first steps start each of them up, and their optimizers.
    for contender in [*contenders.values()] * 2:
        contender.step(0)
    x, y = torch.randn(2, SQUARE, SQUARE)
    steps = {name: contender.step for name, contender in contenders.items()}
    times = alternate({**steps, "product": lambda _: timed(lambda: x @ y)}, options["rounds"])
    for contender in contenders.values():
        contender.end()
    return times


def show(times: dict[str, list[float]], batch: int, options: argparse.Namespace) -> None:
    """Prints the table of a size; `best` is the fastest of the others."""
    sequence = options.sequence
    section = model_section("llama", options.hidden, options.layers, options.vocabulary, sequence)
    config = hf_config(section)
    shape = family_of(config.model_type).shape(config)
    tokens = batch * sequence
    flops = dense_flops(shape, tokens=tokens, sequence=sequence).model
    product_s = statistics.median(times["product"])
    best = min((n for n in PEERS if n in times), key=lambda n: ratios(times[n], times["bare"]))
    print(
        f"hidden {options.hidden}, {options.layers} layers, {tokens} tokens a step; a product of "
        f"matrices of {SQUARE}: {2e-9 * SQUARE**3 / product_s:.1f} GFLOP/s; best: {best}"
    )
    print(f"{'loop':14} {'tokens/s':>9} {'/ bare':>7} {'/ best':>7} {'(min)':>7} {'rate':>5}")
    most = MOST_OF_SMALL if tokens < SMALL else MOST
    for name in (n for n in times if n != "product"):
        to_bare, _ = ratios(times[name], times["bare"])
        to_best, least = ratios(times[name], times[best])
        judged = verdict(to_best, most) if name.startswith("est_ds") else ""
        rate = statistics.median(
            flops * p / s / (2 * SQUARE**3) for s, p in zip(times[name], times["product"])
        )
        print(
            f"{name:14} {tokens / min(times[name]):9.0f} {1 / to_bare:7.3f} {1 / to_best:7.3f} "
            f"({1 / least:5.3f}) {rate:5.2f} {judged}"
        )


if __name__ == "__main__":
    run_script(main)
