"""Whether steps get slower as a run goes on and its plans change: medians of stretches of steps.

Two gloo processes train a small Llama through `est_ds.training.loop`, with other layers in every
step, under each ZeRO stage. ZeRO 3 is the one in question: it learns in what order layers are
gathered, and has to learn anew.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import run_script

from est_ds.config.arguments import positive
from est_ds.run.metrics import read_metrics
from layouts import LAYOUTS, train_in, write_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--stretches", type=positive, default=4)
    parsed = parser.parse_args()
    if parsed.steps < 2 * parsed.stretches:
        parser.error(f"--steps {parsed.steps}: a stretch has at least 2 of them")
    overrides = [
        f"steps={parsed.steps}",
        "method={name: est, balance_groups: 4, phases: [{until: 1.0, layers: 0.5}]}",
        f"checkpoint.every={parsed.steps}",
        f"evaluate.every={parsed.steps}",
    ]
    names = [name for name in LAYOUTS if name.startswith("data 2")]
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder))
        runs = train_in(Path(folder), run, [(name, "steady", overrides) for name in names])
        print("median ms of a step in stretches of", parsed.steps // parsed.stretches, "steps")
        for name, directory in zip(names, runs):
            times = [1000 * e["step_s"] for e in read_metrics(directory)[0]]
            length = len(times) // parsed.stretches
            medians = [
                statistics.median(times[i * length : (i + 1) * length])
                for i in range(parsed.stretches)
            ]
            shown = "  ".join(f"{ms:6.1f}" for ms in medians)
            print(f"{name:16}  {shown}  last over first {medians[-1] / medians[0]:.2f}")


if __name__ == "__main__":
    run_script(main)
