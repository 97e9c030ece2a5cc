"""What a run will do, before anything starts: phases, FLOPs, sizes, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from est_ds.config.run_config import RunConfig
from est_ds.cost.flops import dense_flops, phase_ratios, saved
from est_ds.cost.parameters import total_parameters
from est_ds.design import Outline, make_outline
from est_ds.plans.methods.base import Load, full_loads
from est_ds.plans.shape import Attention, ModelShape
from est_ds.run.prepare import unchecked_data


@dataclass(frozen=True)
class MeanKept:
    """What is kept on average.

    Attributes:
        layers: kept layers of the model.
        heads: kept query heads of an attention, averaged over the attentions of kept layers.
        columns: kept columns of an MLP, averaged over the MLPs of kept layers.
        positions: share of the positions that pass through a layer, averaged over all layers.
    """

    layers: float
    heads: float
    columns: float
    positions: float


@dataclass(frozen=True)
class Estimate:
    """A run in figures.

    Attributes:
        json: the document of `est-ds plan --json`.
        dense: what the full model holds.
        dense_step_flops: `model` FLOPs of a step of the full model.
        unchecked: paths of data that is not here, and so was not checked.
        is_auto: whether `batch.micro` is still to be found; the figures are for 1.
    """

    design: Outline
    json: dict[str, Any]
    dense: MeanKept
    dense_step_flops: float
    unchecked: tuple[str, ...]
    is_auto: bool = False


def make_estimate(config: RunConfig) -> Estimate:
    """All figures of a run, at any size of model.

    Raises:
        UserError: the run file's model, method, schedule, layout or data do not fit together.
    """
    is_auto, config = config.batch.is_auto, config.with_micro(config.batch.micro)
    design = make_outline(config)
    method = design.method
    lengths = {"sequence": config.data.sequence, "target_sequence": design.target_sequence}
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
    document = {
        "phases": phases,
        "saved": {"blocks": fractions.blocks, "model": fractions.model},
        "total_steps": config.steps,
        "parameters": total_parameters(design.facts.pieces),
    }
    size = design.flops_size(config.batch.global_)
    return Estimate(
        design=design,
        json=document,
        dense=mean_kept(method.shape, full_loads(method.shape)),
        dense_step_flops=dense_flops(method.shape, **size).model,
        unchecked=tuple(unchecked_data(design)),
        is_auto=is_auto,
    )


def mean_kept(shape: ModelShape, loads: Sequence[Load]) -> MeanKept:
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
    positions = sum(load.positions for load in loads) / len(loads)
    return MeanKept(layers, heads, columns, positions)


def _number(value: float) -> int | float:
    """A count as a whole number where it is one."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
