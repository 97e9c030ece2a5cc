"""What memory a run takes of a GPU, whether it fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from rich.table import Table

from est_ds.config.deepspeed_keys import check_deepspeed_section
from est_ds.cost.activations import setting_of
from est_ds.cost.gpus import Gpu
from est_ds.cost.memory import Memory, Subject, memory_of_phase, memory_of_pipe_stage, memory_of_run
from est_ds.cost.micro_batches import LEAST, divisors, micro_batches
from est_ds.data.objectives.base import Settings
from est_ds.design import Outline
from est_ds.errors import UserError
from est_ds.report.text import PLAIN, facts_table, gibibytes, number, rendered

# Of a GPU's memory, for the CUDA context, NCCL's buffers, and what the allocator cannot use of what
# it has reserved. An assumption.
FREE = 0.1
SHOWN = 4  # remedies
STATES = ("weights", "gradients", "optimizer")


def subject_of(outline: Outline, on_gpu: bool) -> Subject:
    """What is estimated of a run."""
    config = outline.config
    return Subject(
        config,
        outline.method,
        outline.cuts,
        outline.pipe_stage_parameters,
        (config.data.sequence, outline.target_sequence),
        setting_of(
            config,
            outline.method.shape,
            dropout=outline.dropout,
            on_gpu=on_gpu,
            whole_logits=outline.objective.loss is not Settings.loss,
        ),
    )


def memory_of(outline: Outline, processes: int | None = None, gpu: Gpu | None = None) -> Memory:
    """The most that a process holds.

    Args:
        processes: in place of those of the run file.
        gpu: that it is on; None: one, if the run is in bf16.
    """
    return memory_of_run(*_on(outline, processes, gpu))


def usable_bytes(gpu: Gpu) -> float:
    """What a process can use of a GPU."""
    return (1 - FREE) * gpu.memory_bytes


def memory_on(outline: Outline, gpu: Gpu, is_auto: bool = False) -> tuple[dict[str, Any], str]:
    """`memory` of `est-ds plan --json`, and the same for the eye.

    Args:
        is_auto: whether the micro-batch is still to be found.
    """
    subject, replicas = _on(outline, None, gpu)
    phases = [memory_of_phase(subject, i, replicas) for i in range(len(subject.method.phases))]
    most = max(phases, key=lambda memory: memory.total_bytes)
    usable, largest = usable_bytes(gpu), largest_micro(outline, gpu, is_auto=is_auto)
    fits = most.total_bytes <= usable
    found = [] if fits else list(remedies(outline, gpu, is_auto))[:SHOWN]
    document = {
        "gpu_bytes": gpu.memory_bytes,
        "usable_bytes": usable,
        "fits": fits,
        "peak_bytes": most.total_bytes,
        "host_bytes": most.host_bytes,
        "largest_micro": largest and largest.micro,
        "phases": [
            {
                "name": phase.name,
                **_document(memory),
                "pipe_stages": [
                    _document(memory_of_pipe_stage(subject, i, replicas, stage))
                    for stage in range(len(subject.cuts))
                ],
            }
            for i, (phase, memory) in enumerate(zip(subject.method.phases, phases))
        ],
        "remedies": [vars(remedy) for remedy in found],
    }
    phase = subject.method.phases[phases.index(most)].name
    facts = facts_table(_facts(gpu, (phase, most), largest, found))
    staged = len(subject.cuts) > 1
    rows = [
        ([phase.name, *([f"{memory.pipe_stage}"] if staged else [])], memory)
        for phase, memory in zip(subject.method.phases, phases)
    ]
    table = memory_table(["phase", *(["stage"] if staged else [])], rows)
    return document, rendered(f"memory of {gpu.name}", facts, table, _NOTE)


_NOTE = (
    "Tensors of the fullest process, when it holds most. Buckets: of communication,\n"
    "and what ZeRO 3 has gathered. Phases that draw layers by chance: with all.\n"
    f"{FREE:.0%} of the GPU is left to CUDA, NCCL and the allocator: an assumption."
)


@dataclass(frozen=True)
class Remedy:
    """What would make a run fit.

    Attributes:
        set: overrides.
        micro: the largest micro-batch that fits with them.
        peak_bytes: with that.
    """

    set: tuple[str, ...]
    micro: int
    peak_bytes: float


def allowed_micros(outline: Outline, is_auto: bool, least: int = LEAST) -> list[int]:
    """Micro-batches that may be tried in a layout, largest first; none if its replicas do not
    divide the batch.

    They are those of `batch.micro: auto`, and the run's own. Where the micro-batch decides what is
    drawn (`draw: micro_batch`, dropout), and the run says a number, it is its own alone.

    Args:
        is_auto: whether the micro-batch is still to be found.
        least: see `micro_batches`.
    """
    config = outline.config
    processes = config.parallel.processes or config.parallel.pipe
    try:
        found = micro_batches(config, processes, least)
    except UserError:
        return []
    if is_auto:
        return found
    share = config.batch.global_ // config.data_parallel(processes)
    own = [] if share % config.batch.micro else [config.batch.micro]
    if outline.method.by_micro_batch or outline.dropout:
        return own
    return sorted({*found, *own}, reverse=True)


def largest_micro(
    outline: Outline, gpu: Gpu, overrides: tuple[str, ...] = (), is_auto: bool = False
) -> Remedy | None:
    """The largest micro-batch that fits, of `allowed_micros`; None if none does."""
    config, sizes = outline.config, allowed_micros(outline, is_auto)
    for micro in sizes:
        peak = memory_of(_with(outline, batch={"micro": micro}), gpu=gpu).total_bytes
        if peak <= usable_bytes(gpu):
            said = () if is_auto or micro == config.batch.micro else (f"batch.micro={micro}",)
            return Remedy((*overrides, *said), micro, peak)
    return None


def remedies(outline: Outline, gpu: Gpu, is_auto: bool = False) -> Iterator[Remedy]:
    """What would make a run fit on as many GPUs: a smaller micro-batch, checkpointing, another ZeRO
    stage or more pipe stages; those that change least first."""
    config = outline.config
    processes = config.parallel.processes or config.parallel.pipe
    now = (config.parallel.pipe, config.parallel.zero)
    layouts = [now, *((1, z) for z in range(now[1] + 1, 4) if now[0] == 1)]
    pipes = [n for n in divisors(processes) if n > now[0]]
    layouts += [(pipe, min(now[1], 1)) for pipe in pipes]
    layouts += [(1, zero) for zero in (1, 2, 3) if now[0] > 1]
    again = config.activation_checkpointing
    changes = sorted(
        product(layouts, dict.fromkeys((again, True))),
        key=lambda change: (change[0] != now) + (change[1] != again),
    )
    for (pipe, zero), checkpointing in changes:
        said = [f"parallel.pipe={pipe}"] * (pipe != now[0])
        said += [f"parallel.zero={zero}"] * (zero != now[1])
        said += ["activation_checkpointing=true"] * (checkpointing != again)
        layers = config.parallel.pipe_layers if pipe == now[0] else None
        parallel = {"pipe": pipe, "zero": zero, "pipe_layers": layers}
        changed = _with(outline, parallel=parallel, activation_checkpointing=checkpointing)
        try:
            check_deepspeed_section(changed.config)
            changed.cuts
        except UserError:
            continue
        if remedy := largest_micro(changed, gpu, tuple(said), is_auto):
            yield remedy


def _on(outline: Outline, processes: int | None, gpu: Gpu | None) -> tuple[Subject, int]:
    """The subject, and its replicas."""
    config = outline.config
    processes = processes or config.parallel.processes or config.parallel.pipe
    on_gpu = gpu is not None or config.precision == "bf16"
    return subject_of(outline, on_gpu), config.data_parallel(processes)


def _with(outline: Outline, **changes: Any) -> Outline:
    """The same run with other settings; those of a section are given as a dictionary."""
    config = outline.config
    update = {
        field: getattr(config, field).model_copy(update=value) if isinstance(value, dict) else value
        for field, value in changes.items()
    }
    return replace(outline, config=config.model_copy(update=update))


def _document(memory: Memory) -> dict[str, Any]:
    return {
        "pipe_stage": memory.pipe_stage,
        "peak_bytes": memory.total_bytes,
        "moment": memory.moment,
        "held_bytes": memory.held_bytes,
        "parts": memory.parts,
    }


def _facts(
    gpu: Gpu, most: tuple[str, Memory], largest: Remedy | None, found: list[Remedy]
) -> list[tuple[str, str]]:
    phase, memory = most
    usable = usable_bytes(gpu)
    fits = memory.total_bytes <= usable
    verdict = "yes" if fits else "no"
    facts = [
        ("fits", f"{verdict}: {gibibytes(memory.total_bytes)} of {gibibytes(usable)}"),
        ("most", f"in phase {phase}: {when(memory)}"),
    ]
    if memory.host_bytes:
        facts.append(("host", f"{gibibytes(memory.host_bytes)} a process"))
    if largest:
        facts.append(("largest", f"batch.micro={largest.micro}: {gibibytes(largest.peak_bytes)}"))
    if not fits:
        said = [f"{' '.join(remedy.set)}: {gibibytes(remedy.peak_bytes)}" for remedy in found]
        none = "nothing that was tried on as many GPUs; take more of them, or larger ones"
        facts += [("would fit", line) for line in said or [none]]
    return facts


def when(memory: Memory) -> str:
    """The moment at which most is held, and of a pipeline where."""
    stages = memory.num_pipe_stages > 1
    return f"pipe stage {memory.pipe_stage}, {memory.moment}" if stages else memory.moment


def memory_table(head: list[str], rows: list[tuple[list[str], Memory]]) -> Table:
    """Where the memory of a process goes, a row each, in GiB, or in MiB where it is little.

    Args:
        head: of columns in front, which every row begins with.
    """
    in_gib = max(memory.total_bytes for _, memory in rows) >= 2**30
    name, unit = ("GiB", 2**30) if in_gib else ("MiB", 2**20)
    on_host = any(memory.host_bytes for _, memory in rows)
    table = Table(box=PLAIN, pad_edge=False, padding=(0, 1, 0, 0))
    columns = [f"memory\n{name}", "weights", "gradi-\nents", "opti-\nmizer", "activ-\nations"]
    columns += ["logits", "buckets", *(["on the\nhost"] if on_host else [])]
    for i, column in enumerate([*head, *columns]):
        justify = "left" if column == "phase" else "right"
        table.add_column(column, justify=justify, vertical="bottom", overflow="fold")
    for begin, memory in rows:
        parts = memory.parts
        values = [memory.total_bytes, *(parts[k] for k in STATES), parts["activations"]]
        values += [parts["logits"], parts["buckets"] + parts["gathered"]]
        values += [memory.host_bytes] if on_host else []
        table.add_row(*begin, *(number(value / unit) for value in values))
    return table
