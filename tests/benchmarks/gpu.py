"""Training steps on one GPU, in turns: tokens/s, MFU, time against FLOPs, memory, graphs.

    python tests/benchmarks/gpu.py                     # TinyLlama-1.1B, bf16, ZeRO 1, compiled
    python tests/benchmarks/gpu.py --backend none      # not compiled
    python tests/benchmarks/gpu.py --tiny              # a toy on the CPU, to see that it runs
    python tests/benchmarks/gpu.py --profile 3         # and the kernels that take the time

The first rows are phases: the same counts in every step. The others are whole runs of a method: a
step from each part of the run. Every round takes one step of each row, so that a slow stretch of
the machine hits all of them; a round's order is the reverse of the last one's.

Each decoder layer is compiled by itself, as `compile` in a run file has it. Kept units enter a
graph as an input, so that a plan with the same counts is the same graph for all layers; there
should be as many graphs as layers' counts differ, and one for layers with a scale.

`MFU active` counts the FLOPs that the plan leaves, `MFU dense` those that the whole model would
have taken for the same tokens: the rate at which a run advances, in the dense model's terms.
`saved` is the share of the time saved over the share of the FLOPs saved.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import fixed_method, model_section, random_batch, run_config, run_script, zero_engine
from torch._dynamo import config as dynamo
from torch._dynamo import list_backends, lookup_backend

from est_ds.config.arguments import above_zero, natural, positive
from est_ds.config.run_file import load_run
from est_ds.cost.flops import dense_flops, step_flops
from est_ds.cost.peaks import mfu, peak_flops
from est_ds.plans.methods import build_method
from est_ds.plans.methods.base import Method, plan_loads
from est_ds.plans.plan import Plan
from est_ds.plans.shape import ModelShape

ROOT = Path(__file__).resolve().parents[2]
PHASES = {
    "layers, heads, columns .5": (0.5, 0.5, 0.5),
    "heads, columns .5": (1.0, 0.5, 0.5),
    "full": (1.0, 1.0, 1.0),
}
RUN_STEPS = 1000  # of the runs whose parts the methods' rows take


def methods(layers: int) -> dict[str, dict[str, Any]]:
    """`method` sections as configs/study has them, for a model of so many layers."""
    half = {"heads": 0.5, "columns": 0.5}
    paths = [(i / 4, layers * (i + 2) // 6) for i in range(1, 5)]
    expansion = [{"until": 0.7, "layers": 1}, {"until": 1.0, "layers": layers}]
    return {
        "est": {
            "phases": [{"until": 0.2, "layers": 0.5} | half, {"until": 0.4} | half, {"until": 1.0}]
        },
        "raptr": {"phases": [{"until": end, "layers": count} for end, count in paths]},
        "decay_drop": {"p_max": 0.8},
        "zero_one": {"name": "stacking", "mode": "random", "phases": expansion},
    }


@dataclass
class Row:
    """What was measured of one phase or method, a figure for every step that counts.

    Attributes:
        late: graphs compiled in steps that count.
    """

    name: str
    method: Method
    seconds: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    memory: int = 0
    graphs: int = 0
    late: int = 0

    def plan(self, position: float) -> Plan:
        """Of the step at a position in a run, from 0 to 1."""
        return self.method.plan(int(position * RUN_STEPS))


def make_rows(shape: ModelShape) -> list[Row]:
    rows = [Row(name, fixed_method(kept, shape)) for name, kept in PHASES.items()]
    for name, section in methods(len(shape.layers)).items():
        settings = {"name": name} | section
        rows.append(Row(name, build_method(settings, seed=0, steps=RUN_STEPS, shape=shape)))
    return rows


class Graphs:
    """A torch.compile backend that counts what it compiles."""

    def __init__(self, backend: str) -> None:
        self.count = 0
        self._backend = lookup_backend(backend)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return self._backend(graph, inputs)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--run", default="configs/run/est_tinyllama.yaml", help="for its model")
    parser.add_argument("--batch", type=positive, help="default: 8")
    parser.add_argument("--sequence", type=positive, help="default: 2048")
    parser.add_argument("--zero", type=int, choices=range(4), default=1)
    parser.add_argument("--warmup", type=natural, default=5, help="rounds that do not count")
    parser.add_argument("--steps", type=positive, default=20, help="rounds that count")
    parser.add_argument("--backend", default="inductor", help="of torch.compile, or none")
    parser.add_argument("--peak", type=above_zero, help="FLOP/s; known GPUs have a default")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--profile", type=natural, default=0, help="steps of a phase, afterwards")
    return parser


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.tiny:
        parser.error("no GPU is visible; --tiny runs a toy on the CPU")

    if options.backend not in ("none", *list_backends(exclude_tags=())):
        named = ", ".join(("none", *list_backends()))
        parser.error(f"--backend {options.backend}: use {named}, or one of torch's for debugging")
    batch, sequence = (2, 32) if options.tiny else (8, 2048)
    options.batch, options.sequence = options.batch or batch, options.sequence or sequence
    precision = "bf16"
    section = load_run(ROOT / options.run).model
    if options.tiny:
        precision = "fp32"
        section = model_section("llama", 128, 10, 256, options.sequence)
    config = run_config(
        section,
        options.batch,
        options.sequence,
        options.zero,
        precision=precision,
        activation_checkpointing=options.checkpointing,
    )
    engine, shape = zero_engine(config)
    graphs = None
    if options.backend != "none":
        graphs = Graphs(options.backend)
        engine.compile_layers(graphs)
        dynamo.fail_on_recompile_limit_hit = True
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    peak = options.peak or peak_flops(name, precision)
    size = {"tokens": options.batch * options.sequence, "sequence": options.sequence}
    print(
        f"{name}, {precision}, torch {torch.__version__}, {size['tokens']} tokens a step, ZeRO "
        f"{options.zero}, {'compiled by ' + options.backend if graphs else 'not compiled'}, peak "
        f"{f'{peak / 1e12:g} TFLOP/s' if peak else 'unknown (--peak)'}"
    )
    rows = make_rows(shape)
    batches = (
        random_batch(options.batch, options.sequence, shape.vocabulary, step)
        for step in range(10**9)
    )
    for counts, rounds in ((False, options.warmup), (True, options.steps)):
        for i in range(rounds):
            for row in rows[:: -1 if i % 2 else 1]:
                plan = row.plan((i + 0.5) / rounds)
                took, memory, made = _step(engine, plan, next(batches), graphs)
                row.graphs += made
                if counts:
                    row.seconds.append(took)
                    row.flops.append(step_flops(shape, plan_loads(plan, shape), **size).model)
                    row.memory = max(row.memory, memory)
                    row.late += made
    _print(rows, size["tokens"], dense_flops(shape, **size).model, peak)
    for row in rows[: len(PHASES)] if options.profile else []:
        _profile(engine, row, batches, options.profile)


def _step(engine: Any, plan: Plan, batch: Any, graphs: Graphs | None) -> tuple[float, int, int]:
    """Seconds of a step, bytes of its peak, graphs that were compiled in it."""
    on_gpu = torch.cuda.is_available()
    before = graphs.count if graphs else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = _now(on_gpu)
    with engine.subnetwork.active(plan):
        engine.train_batch(iter([batch]))
    took = _now(on_gpu) - began
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return took, peak, graphs.count - before if graphs else 0


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _print(rows: list[Row], tokens: int, whole: float, peak: float | None) -> None:
    """The full model's row is the one to which the others are compared, round by round."""
    print(
        f"{'row':26} {'tokens/s':>9} {'MFU active':>10} {'MFU dense':>9} {'time':>6} "
        f"{'FLOPs':>6} {'saved':>6} {'GiB':>6} {'graphs':>6} {'late':>4}"
    )
    [dense] = [row for row in rows if row.name == "full"]
    for row in rows:
        seconds, flops = (sum(x) / len(x) for x in (row.seconds, row.flops))
        time_ratio, flops_ratio = sum(row.seconds) / sum(dense.seconds), flops / whole
        active, as_dense = (f"{mfu(f, seconds, peak):.3f}" if peak else "-" for f in (flops, whole))
        saved = f"{(1 - time_ratio) / (1 - flops_ratio):.2f}" if flops_ratio < 1 else "-"
        memory = f"{row.memory / 2**30:.1f}" if row.memory else "-"
        print(
            f"{row.name:26} {tokens / seconds:9.0f} {active:>10} {as_dense:>9} {time_ratio:6.3f} "
            f"{flops_ratio:6.3f} {saved:>6} {memory:>6} {row.graphs:6} {row.late:4}"
        )
    print("graphs: compiled for the row; late: of these, in rounds that count (should be 0)")


def _profile(engine: Any, row: Row, batches: Iterator[Any], steps: int) -> None:
    """The kernels of some steps that take the most time."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu := torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    taken = list(zip(range(steps), batches))
    began = _now(on_gpu)
    with torch.profiler.profile(activities=kinds) as profiler:
        for _, batch in taken:
            with engine.subnetwork.active(row.plan(0.5)):
                engine.train_batch(iter([batch]))
        ended = _now(on_gpu)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [e for e in profiler.key_averages() if not on_gpu or e.device_type.name == "CUDA"]
    events.sort(key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    print(
        f"{row.name}: {steps} steps took {(ended - began) * 1e3:.1f} ms, of which "
        f"{total / 1e3:.1f} ms in {len(events)} kernels"
    )
    for event in events[:25]:
        took = getattr(event, key)
        print(f"  {took / 1e3:9.2f} ms {took / total:6.1%} {event.count:6} x  {event.key[:90]}")


if __name__ == "__main__":
    run_script(main)
