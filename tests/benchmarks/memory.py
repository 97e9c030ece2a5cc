"""Memory of real training steps against its estimate.

    python tests/benchmarks/memory.py              # on the CPU, 19 runs of up to 4 processes
    python tests/benchmarks/memory.py "llama, bf16, ZeRO 2 of 2"
    python tests/benchmarks/memory.py --gpu configs/run/est_tinyllama.yaml batch.micro=8

On the CPU torch's allocator reports every allocation. On a GPU a run file's first process is
measured, on one GPU, with `max_memory_allocated`: its batch is that of one replica.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import run_script, zero_engine

from est_ds.config.arguments import positive
from est_ds.config.run_config import RunConfig
from est_ds.config.run_file import load_run
from est_ds.cost.memory import memory_of_phase
from est_ds.design import make_design
from est_ds.report.plan_memory import subject_of
from peak_memory import CASES, Measured, compared, micro_batches

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="cases; with --gpu overrides")
    parser.add_argument("--gpu", metavar="RUN", help="measure a run file on this GPU")
    parser.add_argument("--micro-batches", type=positive, default=2, help="of a step, with --gpu")
    options = parser.parse_args()
    unknown = [] if options.gpu else [name for name in options.what if name not in CASES]
    if unknown:
        parser.error(f"no case is called {unknown[0]!r}; known are {'; '.join(CASES)}")
    if options.gpu:
        lines = on_gpu(load_run(options.gpu, options.what), options.micro_batches)
    else:
        with tempfile.TemporaryDirectory() as folder:
            lines = compared(options.what or list(CASES), Path(folder), 3600)
    show(lines)


def on_gpu(config: RunConfig, count: int) -> list[Measured]:
    """Measures the phases of a run on one process; on a CPU the estimate alone is shown."""
    batch = {"global_": count * config.batch.micro, "micro": config.batch.micro}
    parallel = config.parallel.model_copy(update={"pipe": 1, "pipe_layers": None})
    config = config.model_copy(
        update={"batch": config.batch.model_copy(update=batch), "parallel": parallel}
    )
    engine, _ = zero_engine(config)
    design, lines, visible = make_design(config), [], torch.cuda.is_available()
    subject = subject_of(design, on_gpu=visible)
    lasts = [phase.until_step - 1 for phase in design.method.phases]
    for i, step in enumerate([0, *lasts]):  # the first step makes the moments
        held = torch.cuda.memory_allocated() if visible else 0
        if visible:
            torch.cuda.reset_peak_memory_stats()
        with engine.subnetwork.active(design.plans(step)):
            engine.train_batch(iter(list(micro_batches(design, count, i))))
        if i:
            memory = memory_of_phase(subject, i - 1, 1)
            peak = torch.cuda.max_memory_allocated() if visible else 0
            pairs = (peak, memory.total_bytes), (held, memory.held_bytes)
            name = design.method.phases[i - 1].name
            lines.append(Measured(config.run_dir, name, 0, *pairs, memory.moment))
    return lines


def show(lines: list[Measured]) -> None:
    print("| run | phase | stage | MiB | estimated | ratio | between steps | when |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for line in lines:
        peak, held = line.peak, line.held
        between = f"{held[1] / held[0]:.3f}" if held[0] else "-"
        ratio = f"{line.ratio:.3f}" if peak[0] else "-"
        print(
            f"| {line.case} | {line.phase} | {line.stage} | {peak[0] / MIB:.1f} | "
            f"{peak[1] / MIB:.1f} | {ratio} | {between} | {line.moment} |"
        )
    ratios = [line.ratio for line in lines if line.peak[0]]
    if ratios:
        print(f"ratios from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    run_script(main)
