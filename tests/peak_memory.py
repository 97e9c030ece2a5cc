"""Bytes that real engines allocate on the CPU, as torch's own allocator says, and as estimated.

The profiler reports every allocation and every release, kernels' own buffers included; what gloo's
threads and Python allocate is not torch's, and not counted.
"""

from __future__ import annotations

import gc
import json
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from cases.families import OBJECTIVES
from cases.memory import CASES, MemoryCase, run_of
from est_ds.config.run_config import RunConfig
from est_ds.config.strict import checked
from est_ds.cost.memory import memory_of_pipe_stage
from est_ds.design import Design, make_design
from est_ds.engine.patches import forget_former_pipeline
from est_ds.ranks.world import World
from est_ds.report.plan_memory import subject_of
from forks import fork, wait
from workers import ROOT, launched

MARK = "est_ds step "
HALF = 65  # of a sequence, a little more: two documents do not share a call
SETTLED = 2  # steps before those that are measured: the first makes the moments
# Measured steps of a phase. The least counts, of them and of the replicas: gloo's threads may keep
# what they have sent for an instant longer.
TIMES = 3


@dataclass(frozen=True)
class Measured:
    """A pipe stage in a phase: what was allocated, and what is estimated, bytes.

    Attributes:
        peak: the most in a step.
        held: before it.
    """

    case: str
    phase: str
    stage: int
    peak: tuple[float, float]
    held: tuple[float, float]
    moment: str

    @property
    def ratio(self) -> float:
        """Estimated over measured."""
        return self.peak[1] / self.peak[0]


def compared(names: list[str], folder: Path, timeout_s: float = 600) -> list[Measured]:
    """Trains cases, and compares; one start for every number of processes."""
    found = {}
    for processes in sorted({CASES[name].processes for name in names}):
        some = [name for name in names if CASES[name].processes == processes]
        own = folder / f"processes_{processes}"
        own.mkdir(parents=True)
        logs = [own / f"rank{rank}.log" for rank in range(processes)]
        ranks = [
            fork(run_rank, (some, str(own)), (log, log), ROOT, environment)
            for log, environment in zip(logs, launched(processes))
        ]
        codes = wait(ranks, timeout_s)
        assert not any(codes), f"{codes}\n" + "\n".join(log.read_text()[-3000:] for log in logs)
        results = [json.loads((own / f"rank{rank}.json").read_text()) for rank in range(processes)]
        found |= {name: [result[name] for result in results] for name in some}
    return [line for name in names for line in _lines(name, found[name])]


def _lines(name: str, ranks: list[list[list[float]]]) -> Iterator[Measured]:
    """Every phase and stage of a case; processes of a stage are neighbours."""
    case: MemoryCase = CASES[name]
    design = make_design(checked(RunConfig, run_of(case)))
    subject, stages = subject_of(design, on_gpu=False), len(design.cuts)
    replicas = case.processes // stages
    for i, phase in enumerate(design.method.phases):
        for stage in range(stages):
            own = [rank[i] for rank in ranks[stage * replicas : (stage + 1) * replicas]]
            memory = memory_of_pipe_stage(subject, i, replicas, stage)
            host = memory.host_bytes  # on a CPU it is the same memory
            yield Measured(
                name,
                phase.name,
                stage,
                (min(peak for _, peak in own), memory.total_bytes + host),
                (min(held for held, _ in own), memory.held_bytes + host),
                memory.moment,
            )


def run_rank(names: list[str], folder: str) -> None:
    """What one rank does: one engine after the other; writes bytes held and peak of every phase."""
    from est_ds.engine.start import leave_processes, start_processes

    world = World.from_environment()
    start_processes(world)
    gc.freeze()  # what was loaded before need not be searched for what is left of an engine
    found = {}
    for name in names:
        forget_former_pipeline()
        found[name] = _measure(run_of(CASES[name]), world, folder)
        gc.collect()
    Path(folder, f"rank{world.rank}.json").write_text(json.dumps(found))
    leave_processes()


def _measure(tree: dict[str, Any], world: World, folder: str) -> list[tuple[int, int]]:
    from est_ds.engine.build import build_engine

    design = make_design(checked(RunConfig, tree))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine = build_engine(design, world)
        accumulation = design.config.batch.accumulation(engine.num_replicas)
        lasts = [phase.until_step - 1 for phase in design.method.phases]
        for i, step in enumerate([0] * SETTLED + lasts * TIMES):
            batches = list(micro_batches(design, accumulation, i))
            with record_function(f"{MARK}{i}"), engine.subnetwork.active(design.plans(step)):
                engine.train_batch(iter(batches))
        alive = _alive()
    engine.deepspeed.destroy()
    steps = _steps(profiled, alive)[SETTLED:]
    return [_least(steps[i :: len(lasts)]) for i in range(len(lasts))]


def _alive() -> set[int]:
    """Where there is memory of a tensor that Python can reach."""
    tensors = [thing for thing in gc.get_objects() if torch.is_tensor(thing)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _least(steps: list[tuple[int, int]]) -> tuple[int, int]:
    return min(held for held, _ in steps), min(peak for _, peak in steps)


def micro_batches(design: Design, accumulation: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """Random inputs and labels, of the shapes and kinds that the objective gives."""
    generator = torch.Generator().manual_seed(seed)
    config, vocabulary = design.config, design.method.shape.vocabulary

    def ids(length: int) -> Tensor:
        size = (config.batch.micro, length)
        return torch.randint(vocabulary, size, generator=generator)

    for _ in range(accumulation):
        source, target = ids(config.data.sequence), design.target_sequence
        labels: Any = ids(target or config.data.sequence)
        if design.method.shape.family in OBJECTIVES:  # not every one is a target
            labels = (labels, torch.tensor(float(labels.numel())))
        inputs: Any = source if target is None else (source, ids(target))
        if config.data.documents == "separate":  # two in each sequence
            inputs = source, torch.arange(source.shape[1]).expand_as(source) % HALF
        yield inputs, labels


def _steps(profiled: profile, alive: set[int]) -> list[tuple[int, int]]:
    """Bytes held before every marked step, and the most within it.

    gloo's threads are not profiled: what has no release though its place was taken anew, or though
    it is not `alive` in the end, counts to the end of the step that made it.
    """
    events: list[tuple[int, int | None, int]] = []

    def walk(nodes: list[Any]) -> None:
        for node in nodes:
            if hasattr(node.extra_fields, "alloc_size"):
                fields = node.extra_fields
                events.append((node.start_time_ns, fields.ptr, fields.alloc_size))
            elif node.name.startswith(MARK):
                events.append((node.start_time_ns, None, 1))
                events.append((node.end_time_ns, None, 0))
            walk(node.children)

    walk(profiled.profiler.kineto_results.experimental_event_tree())
    events.sort(key=lambda event: event[0])
    changes, unseen = _changes(events, alive)
    steps: list[tuple[int, int]] = []
    total, inside = 0, False
    for i, (_, pointer, size) in enumerate(events):
        if pointer is None:
            inside = size == 1
            if inside:
                steps.append((total, total))
            else:
                total -= unseen[i]
        total += changes[i]
        if inside and total > steps[-1][1]:
            steps[-1] = (steps[-1][0], total)
    return steps


def _changes(
    events: list[tuple[int, int | None, int]], alive: set[int]
) -> tuple[list[int], list[int]]:
    """Bytes that every event adds, and those that are gone unseen by the end of a step."""
    changes, unseen = [0] * len(events), [0] * len(events)
    live: dict[int, int] = {}  # where a block was made, by its place
    gone = []
    for i, (_, pointer, size) in enumerate(events):
        if pointer is None:
            continue
        if size > 0:
            gone += [live[pointer]] if pointer in live else []
            live[pointer] = i
            changes[i] = size
        elif pointer in live:  # what was there before the profiler does not count
            changes[i] = -events[live.pop(pointer)][2]
    ends = [i for i, (_, pointer, size) in enumerate(events) if pointer is None and not size]
    gone += [i for pointer, i in live.items() if pointer not in alive]
    for i in gone:
        after = bisect(ends, i)
        if after < len(ends):
            unseen[ends[after]] += events[i][2]
    return changes, unseen
