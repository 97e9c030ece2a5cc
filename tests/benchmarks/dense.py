"""Dense training with est_ds against other loops over the same model, in tokens/s: fp32, CPU.

    python tests/benchmarks/dense.py            # bare PyTorch, est_ds, Trainer
    python tests/benchmarks/dense.py --litgpt   # litgpt too; installs it beside .venv

Every contender is a process of its own that makes one step at a time, in turns. Target: est_ds
(method full) at least 0.97 x the tokens/s of a bare PyTorch loop over the same Hugging Face model.
litgpt goes into build/litgpt without its dependencies, and runs on this environment's torch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import alternate, ratios, verdict
from gate import Contender

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
MOST = 1 / 0.97


def install_litgpt() -> None:
    if (LITGPT / "litgpt").is_dir():
        return
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", LITGPT]
    subprocess.run([*install, *PACKAGES], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--litgpt", action="store_true")
    parser.add_argument("--deepspeed", type=json.loads, default={}, help="est_ds's section, JSON")
    options = parser.parse_args()

    names = ["bare", "est_ds_zero0", "est_ds_zero1", "trainer"]
    if options.litgpt:
        install_litgpt()
        names += ["litgpt_bare", "litgpt_fit"]
    environment = {"OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": ""}
    contenders = {}
    for name in names:
        if name.startswith("litgpt"):
            environment = environment | {"PYTHONPATH": str(LITGPT)}
        command = [HERE / "contenders.py", name, json.dumps(vars(options))]
        contenders[name] = Contender(command, environment)
    # The first steps start each of them up, and their optimizers.
    for contender in [*contenders.values()] * 2:
        contender.step(0)
    times = alternate({n: c.step for n, c in contenders.items()}, options.rounds)
    for contender in contenders.values():
        contender.end()

    tokens = options.batch * options.sequence
    print(f"hidden {options.hidden}, {options.layers} layers, {tokens} tokens a step")
    print(f"{'loop':14} {'tokens/s':>9} {'over bare':>10} {'(min)':>7}")
    for name in names:
        ratio, least = ratios(times[name], times["bare"])
        judged = verdict(ratio, MOST) if name.startswith("est_ds") else ""
        print(
            f"{name:14} {tokens / min(times[name]):9.0f} {1 / ratio:10.3f} ({1 / least:5.3f}) "
            f"{judged}"
        )


if __name__ == "__main__":
    main()
