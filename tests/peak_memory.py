"""Bytes that a real engine allocates on the CPU, as torch's own allocator reports them.

The profiler says every allocation and every release, kernels' own buffers included; what gloo's
threads and Python allocate is not torch's, and not counted.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from est_ds.config.sections import RunConfig
from est_ds.config.strict import checked
from est_ds.design import Design, make_design
from est_ds.ranks.world import World

MARK = "est_ds step "
SETTLED = 2  # steps before those that are measured: the first makes the moments


def micro_batches(design: Design, accumulation: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """Random inputs and labels, of the shapes and kinds that the objective gives."""
    generator = torch.Generator().manual_seed(seed)
    config, shape = design.config, design.method.shape

    def ids(length: int) -> Tensor:
        size = (config.batch.micro, length)
        return torch.randint(shape.vocabulary, size, generator=generator)

    for _ in range(accumulation):
        source, target = ids(config.data.sequence), design.target_sequence
        inputs = source if target is None else (source, ids(target))
        labels = ids(target or config.data.sequence)
        yield inputs, labels


def measure(tree: dict[str, Any]) -> dict[str, Any]:
    """What this process holds between two steps, and at most in a step of every phase, bytes."""
    from est_ds.engine.build import build_engine

    config = checked(RunConfig, tree)
    design, world = make_design(config), World.from_environment()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine = build_engine(design, world, Path(config.run_dir) / "tensorboard")
        accumulation = config.batch.accumulation(engine.num_replicas)
        firsts = [phase.from_step for phase in design.method.phases]
        for i, step in enumerate([0] * SETTLED + firsts):
            batches = list(micro_batches(design, accumulation, i))
            with record_function(f"{MARK}{i}"), engine.subnetwork.active(design.plans(step)):
                engine.train_batch(iter(batches))
    engine.deepspeed.destroy()
    steps = _steps(profiled)[SETTLED:]
    return {"held": steps[0]["held"], "phases": steps}


def _steps(profiled: profile) -> list[dict[str, Any]]:
    """Bytes held before every marked step, the peak within it, and what was live then."""
    events = []

    def walk(nodes: list[Any], path: tuple[str, ...]) -> None:
        for node in nodes:
            if hasattr(node.extra_fields, "alloc_size"):
                found = node.extra_fields
                events.append((node.start_time_ns, found.ptr, found.alloc_size, path))
            elif node.name.startswith(MARK):
                events.append((node.start_time_ns, None, 1, ()))
                events.append((node.end_time_ns, None, 0, ()))
            walk(node.children, (*path, node.name))

    walk(profiled.profiler.kineto_results.experimental_event_tree(), ())
    events.sort(key=lambda e: e[0])
    live: dict[int, tuple[int, tuple[str, ...]]] = {}
    total, steps, inside = 0, [], False
    for _, pointer, size, path in events:
        if pointer is None:
            inside = size == 1
            if inside:
                steps.append({"held": total, "peak": total, "live": dict(live), "at": ()})
        elif size > 0:
            live[pointer] = (size, path)
            total += size
        elif pointer in live:
            total -= live.pop(pointer)[0]
        if inside and total > steps[-1]["peak"]:
            steps[-1].update(peak=total, live=dict(live), at=path)
    return steps


def run_rank(cases: list[dict[str, Any]], folder: str) -> None:
    """What one rank does: every case, one engine after the other; writes what it found."""
    import sys

    from est_ds.engine.start import leave_processes, start_processes

    world = World.from_environment()
    start_processes(world)
    gc.freeze()  # what was loaded before need not be searched for what is left of an engine
    found = []
    for tree in cases:
        if groups := sys.modules.get("deepspeed.utils.groups"):
            groups.mpu = None  # a pipeline's, which a plain engine would take for its own
        result = measure(tree)
        gc.collect()
        for step in result["phases"]:
            live = step.pop("live")
            big = {}
            for size, path in live.values():
                key = (size, " > ".join(path[-6:]))
                big[key] = big.get(key, 0) + 1
            step["live"] = sorted(([n * s, s, n, p] for (s, p), n in big.items()), reverse=True)[:60]
        found.append(result)
        Path(folder, f"rank{world.rank}.json").write_text(json.dumps(found))
    leave_processes()
