"""Training steps on one GPU, phase by phase: tokens/s, MFU, time against FLOPs, memory, graphs.

    python tests/benchmarks/gpu.py                     # TinyLlama-1.1B, bf16, ZeRO 1, compiled
    python tests/benchmarks/gpu.py --backend none      # not compiled
    python tests/benchmarks/gpu.py --tiny              # a toy on the CPU, to see that it runs

The decoder layer's forward is compiled, not the model: one graph serves every layer, and a skipped
layer never reaches it. Kept units enter a graph as an input, so that a plan with the same counts
is the same graph; there should be as many graphs as phases differ in their layers' counts.

`MFU active` counts the FLOPs that the plan leaves, `MFU dense` those that the whole model would
have taken for the same tokens: the rate at which a run advances, in the dense model's terms.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import fixed_method, model_section, random_batch, run_config, zero_engine

from est_ds.config.run_file import load_run
from est_ds.cost.flops import dense_flops, step_flops
from est_ds.engine.start import leave_processes
from est_ds.plans.methods.base import plan_loads
from est_ds.slicing.leaf import Skippable

ROOT = Path(__file__).resolve().parents[2]
PHASES = {
    "layers, heads, columns .5": (0.5, 0.5, 0.5),
    "heads, columns .5": (1.0, 0.5, 0.5),
    "full": (1.0, 1.0, 1.0),
}

# Dense bf16 peak by the makers' data sheets, FLOP/s; the first name that is found counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class Graphs:
    """A torch.compile backend that counts what it compiles."""

    def __init__(self, backend: str) -> None:
        self.count = 0
        self._backend = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return self._backend(graph, inputs)


def compile_layers(layers: dict[int, torch.nn.Module], backend: str) -> Graphs:
    """Compiles the library's layer class, below the class that skips."""
    import torch._dynamo

    graphs = Graphs(backend)
    [original] = {
        next(
            c for c in type(layer).__mro__ if "forward" in vars(c) and not issubclass(c, Skippable)
        )
        for layer in layers.values()
    }
    original.forward = torch.compile(original.forward, backend=graphs, dynamic=False)
    return graphs


def peak_of(name: str, given: float | None) -> float | None:
    return given or next((peak for key, peak in PEAKS.items() if key in name), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--run", default="configs/run/est_tinyllama.yaml", help="for its model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=5, help="steps of a phase, not counted")
    parser.add_argument("--steps", type=int, default=20, help="steps of a phase")
    parser.add_argument("--backend", default="inductor", help="of torch.compile, or none")
    parser.add_argument("--peak", type=float, help="FLOP/s in bf16; known GPUs have a default")
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.tiny:
        parser.error("no GPU is visible; --tiny runs a toy on the CPU")

    precision = "bf16"
    section = load_run(ROOT / options.run).model
    if options.tiny:
        options.batch, options.sequence, precision = 2, 32, "fp32"
        section = model_section("llama", 128, 4, 256, options.sequence)
    config = run_config(
        section,
        options.batch,
        options.sequence,
        options.zero,
        precision=precision,
        activation_checkpointing=options.checkpointing,
    )
    engine, shape = zero_engine(config)
    compiled = options.backend != "none"
    graphs = compile_layers(engine.layers, options.backend) if compiled else None

    tokens = options.batch * options.sequence
    size = {"tokens": tokens, "sequence": options.sequence}
    whole = dense_flops(shape, **size).model
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    peak = peak_of(name, options.peak)
    print(
        f"{name}, {precision}, torch {torch.__version__}, {tokens} tokens a step, ZeRO "
        f"{options.zero}, {'compiled by ' + options.backend if compiled else 'not compiled'}, peak "
        f"{f'{peak / 1e12:g} TFLOP/s' if peak else 'unknown (--peak)'}"
    )
    rows = []
    for phase, kept in PHASES.items():
        method = fixed_method(kept, shape)
        compiled_before, seconds, new_graphs = graphs.count if graphs else 0, [], 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for step in range(options.warmup + options.steps):
            if step == options.warmup and graphs:
                new_graphs = -graphs.count
            batch = random_batch(options.batch, options.sequence, shape.vocabulary, step)
            began = _now(on_gpu)
            with engine.subnetwork.active(method.plan(step)):
                engine.train_batch(iter([batch]))
            seconds.append(_now(on_gpu) - began)
        if graphs:
            new_graphs += graphs.count
        rows.append(
            {
                "phase": phase,
                "seconds": statistics.median(seconds[options.warmup :]),
                "flops": step_flops(shape, plan_loads(method.plan(0), shape), **size).model,
                "memory": torch.cuda.max_memory_allocated() if on_gpu else None,
                "graphs": graphs.count - compiled_before if graphs else 0,
                "late": new_graphs,
            }
        )
    _print(rows, tokens, whole, peak)
    leave_processes()


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _print(rows: list[dict[str, Any]], tokens: int, whole: float, peak: float | None) -> None:
    """A row for every phase; the last one is the full model, to which the others are compared."""
    print(
        f"{'phase':26} {'tokens/s':>9} {'MFU active':>10} {'MFU dense':>9} {'time':>6} "
        f"{'FLOPs':>6} {'time/FLOPs':>10} {'GiB':>6} {'graphs':>6} {'late':>4}"
    )
    for row in rows:
        seconds, flops = row["seconds"], row["flops"]
        time_ratio, flops_ratio = seconds / rows[-1]["seconds"], flops / whole
        active, dense = (f"{f / seconds / peak:.3f}" if peak else "-" for f in (flops, whole))
        memory = "-" if row["memory"] is None else f"{row['memory'] / 2**30:.1f}"
        print(
            f"{row['phase']:26} {tokens / seconds:9.0f} {active:>10} {dense:>9} {time_ratio:6.3f} "
            f"{flops_ratio:6.3f} {time_ratio / flops_ratio:10.3f} {memory:>6} "
            f"{row['graphs']:6} {row['late']:4}"
        )
    print("graphs: compiled in the phase; late: of these, after its first steps (should be 0)")


if __name__ == "__main__":
    main()
