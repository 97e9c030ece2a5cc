"""Which layout of a run on a number of GPUs is fastest, of those whose memory suffices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from est_ds.config.deepspeed_keys import check_deepspeed_section
from est_ds.config.run_config import RunConfig
from est_ds.cost.gpus import Gpu
from est_ds.cost.micro_batches import divisors
from est_ds.cost.time import RunTime, estimated
from est_ds.design import Outline
from est_ds.errors import UserError
from est_ds.report.hours import hours_text, job_of
from est_ds.report.plan_memory import FREE, allowed_micros, memory_of, usable_bytes
from est_ds.report.text import PLAIN, gibibytes, seconds


@dataclass(frozen=True)
class Layout:
    """One way to spread a run.

    Attributes:
        memory_bytes: the most that a process holds.
    """

    config: RunConfig
    time: RunTime
    memory_bytes: float

    def fits(self, gpu: Gpu) -> bool:
        """Whether a GPU's memory suffices."""
        return self.memory_bytes <= usable_bytes(gpu)


def compared_layouts(outline: Outline, gpu: Gpu, is_auto: bool = False) -> list[Layout]:
    """Every layout of the run's processes, the fastest first: of pipe stages, ZeRO stages and
    micro-batches. Where the micro-batch decides what is drawn (`draw: micro_batch`, dropout), it
    stays, unless it is still to be found.

    Args:
        is_auto: whether it is.

    Raises:
        UserError: the run's time cannot be estimated, or its batch fits no layout.
    """
    job_of(outline, gpu)  # raises
    found = [
        Layout(
            spread.config, estimated(job_of(spread, gpu)), memory_of(spread, gpu=gpu).total_bytes
        )
        for spread in _spread(outline, is_auto)
    ]
    return sorted(found, key=lambda layout: layout.time.total_s)


def _spread(outline: Outline, is_auto: bool) -> Iterator[Outline]:
    """Outlines of the same run in every layout that it allows."""
    config, method = outline.config, outline.method
    processes = config.parallel.processes or config.parallel.pipe
    for pipe in divisors(processes):
        at_pipe = None
        for zero in (0, 1) if pipe > 1 else (0, 1, 2, 3):
            if zero == 3 and method.by_micro_batch and method.shape.encoder_layers:
                continue
            layers = config.parallel.pipe_layers if pipe == config.parallel.pipe else None
            parallel = {"pipe": pipe, "zero": zero, "pipe_layers": layers}
            update = {"parallel": config.parallel.model_copy(update=parallel)}
            laid = replace(outline, config=config.model_copy(update=update))
            # Of any number a stage: its waiting is part of the time.
            for micro in reversed(allowed_micros(laid, is_auto, least=0)):
                changed = laid.config.with_micro(micro)
                spread = replace(laid, config=changed)
                try:
                    check_deepspeed_section(changed)
                    at_pipe = at_pipe or spread.cuts
                except UserError:
                    break
                vars(spread)["cuts"] = at_pipe  # the search for cuts does not depend on the rest
                yield spread


def layouts_document(layouts: list[Layout], gpu: Gpu) -> list[dict[str, Any]]:
    """`layouts` of `est-ds plan --json`: all of them, the fastest first."""
    return [
        {
            **_numbers(layout),
            "hours": layout.time.total_s / 3600,
            "dense_hours": layout.time.dense_s / 3600,
            "memory_bytes": layout.memory_bytes,
            "fits": layout.fits(gpu),
        }
        for layout in layouts
    ]


def _numbers(layout: Layout) -> dict[str, int]:
    config, time = layout.config, layout.time
    replicas = config.data_parallel(time.processes)
    return {
        "pipe": config.parallel.pipe,
        "data": replicas,
        "zero": config.parallel.zero,
        "micro": config.batch.micro,
        "accumulation": config.batch.accumulation(replicas),
    }


def layouts_table(layouts: list[Layout], gpu: Gpu) -> tuple[Table, str]:
    """The fastest that fits of every pipe and ZeRO stage, and how to ask for the first of all."""
    table = Table(box=PLAIN, pad_edge=False)
    best: dict[tuple[int, int], Layout] = {}
    for layout in layouts:
        parallel = layout.config.parallel
        if layout.fits(gpu):
            best.setdefault((parallel.pipe, parallel.zero), layout)
    if not best:
        least = min(layouts, key=lambda layout: layout.memory_bytes)
        again = least.config.activation_checkpointing
        return table, (
            f"No layout fits: the smallest takes {gibibytes(least.memory_bytes)} of "
            f"{gibibytes(usable_bytes(gpu))}.\nTake more GPUs, or larger ones"
            f"{'' if again else ', or set activation_checkpointing=true'}."
        )
    for name in ("pipe", "data", "ZeRO", "micro", "accumulation", "step", "hours", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for layout in best.values():
        time = layout.time
        table.add_row(
            *(f"{number:,}" for number in _numbers(layout).values()),
            seconds(time.total_s / time.dense.num_steps),
            hours_text(time.total_s),
            f"{layout.memory_bytes / 2**30:.1f} GiB",
        )
    now = next(iter(best.values())).config
    return table, (
        f"The fastest: parallel.pipe={now.parallel.pipe} parallel.zero={now.parallel.zero} "
        f"batch.micro={now.batch.micro}\n"
        f"Of every number of pipe stages and ZeRO stage the fastest micro-batch that\n"
        f"leaves {FREE:.0%} of the {gpu.memory_bytes / 2**30:g} GiB free."
    )
