"""What a run will do, before anything starts: phases, FLOPs, sizes, memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from est_ds.config import RunConfig
from est_ds.flops import dense_flops, phase_ratios, saved
from est_ds.model import count_parameters, empty_model
from est_ds.plans.methods.base import Load, full_loads
from est_ds.plans.shape import Attention, ModelShape
from est_ds.run import Planned, plan_run, unchecked_data


@dataclass(frozen=True)
class Kept:
    """What is kept on average.

    Attributes:
        layers: kept layers of the model.
        heads: kept query heads of an attention, averaged over the attentions of kept layers.
        columns: kept columns of an MLP, averaged over the MLPs of kept layers.
    """

    layers: float
    heads: float
    columns: float


@dataclass(frozen=True)
class Memory:
    """Bytes that one process of the fullest pipe stage needs, activations and buffers aside; and
    on the host, with `parallel.offload`."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    host_bytes: float = 0.0

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class RunPlan:
    """A run in figures.

    Attributes:
        json: the document of `est-ds plan --json`.
        dense: what the full model holds.
        dense_step_flops: `model` FLOPs of a step of the full model.
        stage_parameters: parameters of every pipe stage; a tied one counts where it is held.
        unchecked: paths of data that is not here, and so was not checked.
    """

    planned: Planned
    json: dict[str, Any]
    dense: Kept
    dense_step_flops: float
    stage_parameters: tuple[int, ...]
    unchecked: tuple[str, ...]


def plan_report(config: RunConfig, as_json: bool, plot: str | None = None) -> str:
    """The plan of a run as a table, or as the JSON document of `est-ds plan --json`.

    Every phase has `kept_layers` (of the model), `kept_heads` and `kept_columns` (of one kept
    layer), all as means over the phase's steps, and its FLOPs as ratios of the dense ones.
    `saved` is the fraction of the dense FLOPs of the whole run that is saved.

    Args:
        plot: file to draw it into; its ending is one that matplotlib knows (.png, .svg, .pdf).

    Raises:
        UserError: the run file's model, method, schedule, layout or data do not fit together, or
            the file cannot be written.
    """
    from est_ds.report.plan_text import layouts, plan_tables

    layouts(config)  # the batch must fit the processes, whether a table shows it or not
    plan = make_plan(config)
    if as_json and plan.unchecked:
        print(f"est-ds: not checked, since not here: {', '.join(plan.unchecked)}", file=sys.stderr)
    text = json.dumps(plan.json, indent=2) if as_json else plan_tables(plan)
    if plot:
        from est_ds.report.plan_figure import write_plan_figure  # matplotlib takes its time

        write_plan_figure(plan, Path(plot))
    return text


def make_plan(config: RunConfig) -> RunPlan:
    """All figures of a run, from an empty model: seconds and no memory at any size.

    Raises:
        UserError: the run file's model, method, schedule, layout or data do not fit together.
    """
    planned = plan_run(config)
    method = planned.method
    lengths = {"sequence": config.data.sequence, "target_sequence": planned.target_sequence}
    phases = []
    for i, phase in enumerate(method.phases):
        ratios = phase_ratios(method, i, **lengths)
        kept = mean_kept(method.shape, method.mean_loads(i))
        phases.append(
            {
                "name": phase.name,
                "from_step": phase.from_step,
                "until_step": phase.until_step,
                "kept_layers": _number(kept.layers),
                "kept_heads": _number(kept.heads),
                "kept_columns": _number(kept.columns),
                "blocks_ratio": ratios.blocks,
                "model_ratio": ratios.model,
            }
        )
    fractions = saved(method, **lengths)
    model = empty_model(planned.hf_config)
    document = {
        "phases": phases,
        "saved": {"blocks": fractions.blocks, "model": fractions.model},
        "total_steps": config.steps,
        "parameters": count_parameters(model),
    }
    size = planned.flops_size(config.batch.global_)
    return RunPlan(
        planned=planned,
        json=document,
        dense=mean_kept(method.shape, full_loads(method.shape)),
        dense_step_flops=dense_flops(method.shape, **size).model,
        stage_parameters=_stage_parameters(planned, model),
        unchecked=tuple(unchecked_data(planned)),
    )


def mean_kept(shape: ModelShape, loads: Sequence[Load]) -> Kept:
    """Kept layers, and heads and columns of a kept layer, each layer weighted by its chance.

    Where attention and MLP are skipped apart, a layer counts by the chance of each.
    """
    layers = sum(load.probability for load in loads)
    totals, counts = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
    for parts, load in zip(shape.layers, loads):
        for part, units in zip(parts, load.units):
            is_attention = isinstance(part, Attention)
            totals[is_attention] += load.probability * units
            counts[is_attention] += load.probability
    heads, columns = (totals[k] / counts[k] if counts[k] else 0.0 for k in (True, False))
    return Kept(layers, heads, columns)


def memory_per_process(
    parameters: int, *, precision: str, zero: int, data_parallel: int, offload: bool = False
) -> Memory:
    """Model states of a process that holds `parameters`, as DeepSpeed keeps them.

    With w = 2 bytes (bf16) or 4 (fp32) a parameter and d replicas: weights w; gradients, which are
    added up in float32, 4, or 4 / d from ZeRO 2; AdamW's two moments 8 and a float32 copy of the
    weights 4 (ZeRO 1 and 2 keep one for float32 weights too), divided by d from ZeRO 1. From ZeRO
    3 the weights are divided by d as well (arXiv 1910.02054, figure 1). With the optimizer on the
    host its state and the float32 gradients are there.
    """
    width = 2 if precision == "bf16" else 4
    has_copy = precision == "bf16" or zero in (1, 2) or offload

    def share(first_stage: int) -> float:
        return parameters / (data_parallel if zero >= first_stage else 1)

    optimizer_bytes = (12 if has_copy else 8) * share(1)
    gradients_bytes = 4 * share(2)
    return Memory(
        weights_bytes=width * share(3),
        gradients_bytes=gradients_bytes,
        optimizer_bytes=0 if offload else optimizer_bytes,
        host_bytes=optimizer_bytes + gradients_bytes if offload else 0,
    )


def _stage_parameters(planned: Planned, model: Any) -> tuple[int, ...]:
    pipe = planned.config.parallel.pipe
    if pipe == 1:
        return (count_parameters(model),)
    starts = {0, *planned.cuts[:-1]}
    stages: list[dict[int, int]] = []
    for piece in planned.family.pieces(planned.hf_config):
        if not stages or (piece.layer in starts and piece.layer != 0):
            stages.append({})
        for path in piece.modules:
            stages[-1] |= {id(p): p.numel() for p in model.get_submodule(path).parameters()}
    return tuple(sum(stage.values()) for stage in stages)


def _number(value: float) -> int | float:
    """A count as a whole number where it is one."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
