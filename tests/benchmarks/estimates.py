"""What `est-ds plan --gpu` estimates, beside what was measured.

    python tests/benchmarks/estimates.py

Step times of this engine on an H200 (`gpu.py`), to which the constants of `est_ds/cost/time.py` are
fitted; and the MFU that other systems have published, to which nothing is fitted. And what it
estimates for more GPUs than were measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from est_ds.config.run_file import load_run
from est_ds.cost.gpus import gpu_of
from est_ds.cost.time import PUBLISHED, Job, PublishedMfu, RunTime, estimated, step_seconds
from est_ds.design import make_outline
from est_ds.report.hours import job_of
from est_ds.report.layout_search import compared_layouts

RUNS = Path(__file__).resolve().parents[2] / "configs" / "run"
HALVES = (
    "method={name: est, phases: [{until: 0.3, layers: 0.5, heads: 0.5, columns: 0.5}, "
    "{until: 0.6, heads: 0.5, columns: 0.5}, {until: 1.0}]}"
)
KEPT = ("layers, heads, columns .5", "heads, columns .5", "all")
# Tokens/s of these phases on one H200, by run file and whether layers were compiled.
MEASURED = {
    ("est_tinyllama.yaml", True): (16_384, (161_084, 103_352, 69_020)),
    ("est_tinyllama.yaml", False): (16_384, (116_526, 69_839, 50_879)),
    ("est_gpt2.yaml", False): (32_768, (272_665, 229_511, 196_152)),
}
# Width and layers of what is published: mosaicml/llm-foundry, scripts/train/yamls/pretrain.
WIDTHS = {
    "MPT-760M": (1536, 24),
    "MPT-1B": (2048, 24),
    "MPT-3B": (2560, 32),
    "MPT-7B": (4096, 32),
}
GPUS = {"H100": "h100-80g", "A100": "a100-80g"}
COMPARED = [row for row in PUBLISHED if row.model in WIDTHS]


def job(gpu: str, run: str, *overrides: str) -> Job:
    """A shipped run file on GPUs."""
    return job_of(make_outline(load_run(RUNS / run, list(overrides))), gpu_of(gpu))


def measured_steps(run: str, compiled: bool) -> Iterator[tuple[str, float, float]]:
    """What is kept, and milliseconds of a step: estimated and measured."""
    tokens, speeds = MEASURED[run, compiled]
    layout = "parallel={pipe: 1, zero: 1, processes: 1}"
    flags = (HALVES, "precision=bf16", layout, f"compile={json.dumps(compiled)}")
    sequences = tokens // job("h200", run).size.sequence
    on_gpu = job("h200", run, *flags, f"batch={{global: {sequences}, micro: {sequences}}}")
    for phase, (kept, speed) in enumerate(zip(KEPT, speeds)):
        yield kept, 1000 * step_seconds(on_gpu, phase).total_s, 1000 * tokens / speed


def published_job(row: PublishedMfu) -> Job:
    """The training of a published figure: 8 GPUs, 14 sequences of 2,048 each, ZeRO 1, compiled."""
    width, layers = WIDTHS[row.model]
    model = (
        f"model={{model_type: gpt2, vocab_size: 50432, n_embd: {width}, n_layer: {layers}, "
        f"n_head: {width // 64}, n_positions: 2048, resid_pdrop: 0.0, embd_pdrop: 0.0, "
        f"attn_pdrop: 0.0}}"
    )
    shared = ("data.sequence=2048", "batch={global: 112, micro: 14}", "compile=true")
    layout = "parallel={pipe: 1, zero: 1, processes: 8}"
    return job(GPUS[row.device], "est_gpt2.yaml", "method={name: full}", model, *shared, layout)


def spread(processes: int) -> Iterator[tuple[str, RunTime]]:
    """TinyLlama with EST, compiled, on H100s, 1,024 sequences a step: in its run file's layout (in
    smaller micro-batches where it would have too few), and in the fastest one."""
    micro = min(8, 1024 * 2 // processes)
    spread = ("compile=true", f"parallel.processes={processes}", f"batch.micro={micro}")
    outline, gpu = make_outline(load_run(RUNS / "est_tinyllama.yaml", spread)), gpu_of("h100-80g")
    fastest = next(layout for layout in compared_layouts(outline, gpu) if layout.fits(gpu))
    for config, time in (
        (outline.config, estimated(job_of(outline, gpu))),
        (fastest.config, fastest.time),
    ):
        layout = config.parallel
        yield f"pipe {layout.pipe}, ZeRO {layout.zero}, micro {config.batch.micro}", time


def spread_row(processes: int, layout: str, time: RunTime) -> str:
    """Milliseconds of the dense step and its shares, the phases' time over it, and what is saved:
    of the time, and of it over what is saved of the FLOPs."""
    parts = time.dense.parts
    shares = [100 * s / time.dense.step_s for s in (parts.waiting_s, parts.links_s)]
    phases = [phase.step_s / time.dense.step_s for phase in time.phases[:-1]]
    flops = sum(phase.num_steps * phase.flops for phase in time.phases)
    flops_saved = 1.0 - flops / (time.dense.num_steps * time.dense.flops)
    return (
        f"{processes:>5} {layout:<26}{1000 * time.dense.step_s:8.0f}"
        + "".join(f"{share:7.0f} %" for share in shares)
        + "".join(f"{ratio:9.2f}" for ratio in phases)
        + f"{time.saved:9.3f}{time.saved / flops_saved:8.2f}"
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("step on an H200, ms: estimated, measured, ratio")
    for run, compiled in MEASURED:
        for kept, ours, theirs in measured_steps(run, compiled):
            name = f"{run}{', compiled' if compiled else ''}, {kept}"
            print(f"{name:<58}{ours:7.1f}{theirs:7.1f}{ours / theirs:6.2f}")
    print("MFU: estimated, published, ratio")
    for row in COMPARED:
        time = estimated(published_job(row))
        use = time.mfu(time.dense)
        print(f"{row.model + ' on ' + row.device:<58}{use:7.3f}{row.mfu:7.3f}{use / row.mfu:6.2f}")
    print("TinyLlama with EST on H100s: layout, dense step in ms, its waiting and links, phases")
    print("small and narrow over it, saved of the run's time, and of that over the FLOPs saved")
    for processes in (8, 64, 512):
        for layout, time in spread(processes):
            print(spread_row(processes, layout, time))


if __name__ == "__main__":
    main()
