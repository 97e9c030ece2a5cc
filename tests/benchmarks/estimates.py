"""What `est-ds plan --gpu` estimates, beside what was measured.

    python tests/benchmarks/estimates.py

Step times of this engine on an H200 (`gpu.py`), to which the constants of `est_ds/cost/time.py` are
fitted; and the MFU that other systems have published, to which nothing is fitted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from est_ds.config.run_file import load_run
from est_ds.cost.flops import StepSize
from est_ds.cost.gpus import gpu_of
from est_ds.cost.time import PUBLISHED, Job, PublishedMfu, estimated, step_seconds
from est_ds.design import make_outline

RUNS = Path(__file__).resolve().parents[2] / "configs" / "run"
HALVES = (
    "method={name: est, phases: [{until: 0.3, layers: 0.5, heads: 0.5, columns: 0.5}, "
    "{until: 0.6, heads: 0.5, columns: 0.5}, {until: 1.0}]}"
)
KEPT = ("layers, heads, columns .5", "heads, columns .5", "all")
# Tokens/s of these phases on one H200, by run file and whether layers were compiled.
MEASURED = {
    ("est_tinyllama.yaml", True): (16_384, (121_658, 84_806, 60_881)),
    ("est_tinyllama.yaml", False): (16_384, (95_712, 61_485, 46_047)),
    ("est_gpt2.yaml", True): (32_768, (254_936, 242_796, 219_012)),
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
    outline = make_outline(load_run(RUNS / run, list(overrides)))
    size = StepSize(**outline.flops_size(outline.config.batch.micro))
    parts = outline.config, outline.method, outline.facts.pieces, outline.cuts, size
    return Job(gpu_of(gpu), *parts)


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


def main() -> None:
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


if __name__ == "__main__":
    main()
