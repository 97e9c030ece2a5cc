"""Hours and money of a run and of its dense twin: the document and the text of `est-ds plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from rich.table import Table

from est_ds.cost.flops import StepSize, step_flops
from est_ds.cost.gpus import Gpu
from est_ds.cost.peaks import peak_flops
from est_ds.cost.time import Job, PhaseTime, RunTime, nearest_published
from est_ds.design import Outline
from est_ds.plans.methods.base import Load, full_loads
from est_ds.report.asked import Asked
from est_ds.report.text import PLAIN, machine_text, seconds
from est_ds.run.step_times import StepTimes, Turns

PARTS = {"waiting_s": "waiting", "links_s": "links", "optimizer_s": "opti-\nmizer"}
NOTE = (
    "An estimate by peak rates, memory and links, and by what this engine reached\n"
    "on an H200: expect a quarter more or less. Evaluations and checkpoints come on\n"
    "top. Dense: as many steps of the full model on the same GPUs. Waiting: of pipe\n"
    "stages. Links: communication that nothing hides. MFU: of the FLOPs computed."
)
MEASURED_NOTE = (
    "Measured here, in turns: medians of whole steps. Evaluations and checkpoints\n"
    "come on top. Dense: as many steps of the full model."
)


def job_of(outline: Outline, gpu: Gpu) -> Job:
    """A run on GPUs.

    Raises:
        UserError: its time cannot be estimated.
    """
    size = StepSize(**outline.flops_size(outline.config.batch.micro))  # type: ignore[arg-type]
    parts = outline.config, outline.method, outline.facts.pieces, outline.cuts, size
    return Job(gpu, *parts)


def measured(outline: Outline, times: StepTimes) -> RunTime:
    """The time of a run by steps that were measured, of those that are left of it."""
    config, method = outline.config, outline.method
    size = outline.flops_size(config.batch.global_)

    def phase_time(turns: Turns, loads: Sequence[Load]) -> PhaseTime:
        flops = step_flops(method.shape, loads, **size).model
        return PhaseTime(turns.name, turns.num_steps, median(turns.step_s), flops)

    phases = tuple(
        phase_time(turns, method.computed(method.mean_loads(turns.phase)))
        for turns in sorted(times.turns, key=lambda t: -1 if t.phase is None else t.phase)
        if turns.phase is not None and turns.num_steps
    )
    full = phase_time(times.baseline, full_loads(method.shape))
    dense = replace(full, name="dense", num_steps=sum(phase.num_steps for phase in phases))
    layout = times.layout
    peak = peak_flops(layout["device"], config.precision)
    return RunTime(layout["device"], layout["pipe"] * layout["replicas"], phases, dense, peak)


def time_document(time: RunTime) -> dict[str, Any]:
    """`time` of `est-ds plan --json`."""
    return {
        "device": time.device,
        "count": time.processes,
        "measured": time.dense.parts is None,
        "hours": time.total_s / 3600,
        "dense_hours": time.dense_s / 3600,
        "gpu_hours": time.processes * time.total_s / 3600,
        "dense_gpu_hours": time.processes * time.dense_s / 3600,
        "saved": time.saved,
        "dense_step_s": time.dense.step_s,
        "dense_mfu": time.mfu(time.dense),
        "phases": [_phase_document(time, phase) for phase in time.phases],
    }


def _phase_document(time: RunTime, phase: PhaseTime) -> dict[str, Any]:
    parts = vars(phase.parts) if phase.parts else {}
    return {
        "name": phase.name,
        "steps": phase.num_steps,
        "step_s": phase.step_s,
        "ratio": phase.step_s / time.dense.step_s,
        "mfu": time.mfu(phase),
        **parts,
    }


def cost_document(time: RunTime, price: float) -> dict[str, Any]:
    """`cost` of `est-ds plan --json`.

    Args:
        price: of an hour of one GPU.
    """
    run, dense = (time.processes * s / 3600 * price for s in (time.total_s, time.dense_s))
    return {"price": price, "run": run, "dense": dense, "saved": dense - run}


def time_facts(time: RunTime, parameters: int, asked: Asked) -> list[tuple[str, str]]:
    """Hours, money and what others reached."""
    run, dense = (_hours(time, s) for s in (time.total_s, time.dense_s))
    rows = [
        ("time", f"{run}; dense training takes {dense}"),
        ("time saved", f"{time.saved:.2%} ({1 / (1 - time.saved):.3f}x)"),
    ]
    if asked.price:
        cost = cost_document(time, asked.price)
        rows.append(
            (
                "money",
                f"{_amount(cost['run'])} at {asked.price:,g} a GPU-hour; dense training "
                f"{_amount(cost['dense'])}, {_amount(abs(cost['saved']))} "
                f"{'more' if cost['saved'] >= 0 else 'less'}",
            )
        )
    if asked.times:
        rows.append(("machine", machine_text(asked.times)))
    gpu = asked.gpu
    near = nearest_published(gpu, parameters) if gpu else None
    if gpu and near and time.peak == gpu.peak_flops("bf16"):  # theirs are of bf16
        rows.append(
            ("published", f"MFU {near.mfu} of {near.model} on {near.device} ({near.source})")
        )
    return rows


def time_table(time: RunTime, tokens_per_step: int) -> Table:
    """One row a phase, and one of the full model: seconds, speed, and where the time goes."""
    table = Table(box=PLAIN, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("phase", overflow="fold", vertical="bottom")
    parts = [] if time.dense.parts is None else list(PARTS)
    heads = ["step", "of\ndense", "tokens/s", *(["MFU"] if time.peak else [])]
    for name in (*heads, *(PARTS[part] for part in parts), "hours"):
        table.add_column(name, justify="right", vertical="bottom", no_wrap=True)
    for phase in (*time.phases, time.dense):
        use = time.mfu(phase)
        table.add_row(
            phase.name,
            seconds(phase.step_s),
            f"{phase.step_s / time.dense.step_s:.3f}",
            f"{tokens_per_step / phase.step_s:,.0f}",
            *([f"{use:.2f}"] if use is not None else []),
            *(f"{getattr(phase.parts, part) / phase.step_s:.0%}" for part in parts),
            hours_text(phase.num_steps * phase.step_s),
        )
    return table


def hours_text(total_s: float) -> str:
    """Hours in three digits, or whole ones."""
    hours = total_s / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _hours(time: RunTime, total_s: float) -> str:
    return f"{seconds(total_s)}, {_amount(time.processes * total_s / 3600)} GPU-hours"


def _amount(number: float) -> str:
    if 0 < number < 0.1:
        return f"{number:.3g}"
    return f"{number:,.0f}" if number >= 100 else f"{number:,.2f}"
