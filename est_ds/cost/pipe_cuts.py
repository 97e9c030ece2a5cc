"""Which pipe stage owns which layers."""

from __future__ import annotations

from itertools import accumulate

from est_ds.config.sections import Parallel
from est_ds.cost.flops import flops_by_layer
from est_ds.errors import UserError
from est_ds.plans.methods.base import Method


def pipe_cuts(method: Method, parallel: Parallel, **size: float | None) -> list[int]:
    """Ends of the layer ranges of the pipe stages.

    As `parallel.pipe_layers` says; otherwise such that the stage with the most FLOPs, over the
    whole schedule and with the output head, has as few as possible. Where the method spreads kept
    layers over runs, a stage holds whole runs, and as many as any other.

    Args:
        size: of a micro-batch, as `flops.flops_by_layer` takes it.

    Raises:
        UserError: there are too few layers, or the cuts do not fall on ends of runs.
    """
    num_layers, pipe, runs = method.shape.num_layers, parallel.pipe, method.run_lengths
    if pipe > num_layers:
        raise UserError(
            f"parallel.pipe={pipe} is more than the model's {num_layers} layers; use fewer."
        )
    ends = list(accumulate(runs or [1] * num_layers))
    if parallel.pipe_layers is not None:
        return _checked(list(accumulate(parallel.pipe_layers)), parallel, ends, runs)
    if runs is not None:
        if len(runs) % pipe:
            raise UserError(
                f"parallel.pipe={pipe} does not divide method.balance_groups ({len(runs)} runs of "
                f"layers {list(runs)}): a pipe stage must hold whole runs; set "
                f"method.balance_groups to a multiple of {pipe} (it is part of the method: the "
                f"plans change), or parallel.pipe to a divisor of {len(runs)}."
            )
        share = len(runs) // pipe
        return ends[share - 1 :: share]
    return _cheapest(schedule_costs(method, **size), pipe)


def schedule_costs(method: Method, **size: float | None) -> list[float]:
    """Model FLOPs of every layer over the whole schedule, the head's with the last layer's."""
    costs = [0.0] * method.shape.num_layers
    for i, phase in enumerate(method.phases):
        layers, head = flops_by_layer(method.shape, method.mean_loads(i), **size)
        layers_and_head = [layer.model for layer in layers]
        layers_and_head[-1] += head
        steps = phase.until_step - phase.from_step
        costs = [cost + steps * more for cost, more in zip(costs, layers_and_head)]
    return costs


def stage_costs(
    method: Method, phase: int, cuts: list[int], **size: float | None
) -> list[float]:
    """Mean model FLOPs of every pipe stage in the steps of a phase."""
    layers, head = flops_by_layer(method.shape, method.mean_loads(phase), **size)
    starts = [0, *cuts[:-1]]
    costs = [sum(x.model for x in layers[a:b]) for a, b in zip(starts, cuts)]
    costs[-1] += head
    return costs


def imbalance(costs: list[float]) -> float:
    """The slowest pipe stage's share over the mean: 1 is perfect."""
    return max(costs) * len(costs) / sum(costs)


def bubble(pipe: int, accumulation: int) -> float:
    """The share of a step in which a stage waits for the first or after the last micro-batch, if
    all stages are equally fast: (p - 1) / (m + p - 1) (GPipe, arXiv 1811.06965, section 2.3)."""
    return (pipe - 1) / (accumulation + pipe - 1)


def _checked(
    cuts: list[int], parallel: Parallel, ends: list[int], runs: tuple[int, ...] | None
) -> list[int]:
    if cuts[-1] != ends[-1]:
        raise UserError(
            f"parallel.pipe_layers={parallel.pipe_layers} adds up to {cuts[-1]}, and the model has "
            f"{ends[-1]} layers."
        )
    if not set(cuts) <= set(ends):
        raise UserError(
            f"parallel.pipe_layers={parallel.pipe_layers}: the method spreads kept layers over "
            f"runs of {list(runs or ())} (method.balance_groups), and a pipe stage must hold whole "
            f"runs; cut at ends of them."
        )
    return cuts


def _cheapest(costs: list[float], pipe: int) -> list[int]:
    """Ends of `pipe` ranges such that the costliest costs least; then, the more equal ones."""
    before = [0.0, *accumulate(costs)]
    # end -> (costliest range, sum of squares), cuts: of the layers before `end` on so many stages
    best: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {0: ((0.0, 0.0), ())}
    for _ in range(pipe):
        found: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {}
        for start, ((worst, squares), cuts) in best.items():
            for end in range(start + 1, len(costs) + 1):
                cost = before[end] - before[start]
                candidate = ((max(worst, cost), squares + cost * cost), (*cuts, end))
                if end not in found or candidate < found[end]:
                    found[end] = candidate
        best = found
    return list(best[len(costs)][1])
