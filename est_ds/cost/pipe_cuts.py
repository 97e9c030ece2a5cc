"""Which pipe stage owns which layers."""

from __future__ import annotations

from itertools import accumulate, pairwise
from operator import le
from typing import Any

from est_ds.config.sections import Parallel
from est_ds.cost.flops import StepSize, flops_by_layer
from est_ds.errors import UserError
from est_ds.plans.methods.base import Method


def pipe_cuts(method: Method, parallel: Parallel, **size: Any) -> list[int]:
    """Ends of the layer ranges of the pipe stages.

    As `parallel.pipe_layers` says; otherwise such that the FLOPs of every phase's busiest stage,
    head included, add up to as few as possible: the others wait for it. Where the method spreads
    kept layers over bands, a stage holds whole bands, and as many as any other.

    Args:
        size: of a micro-batch, that of `flops.StepSize`.

    Raises:
        UserError: there are too few layers, or the cuts do not fall on ends of bands.
    """
    num_layers, pipe, bands = method.shape.num_layers, parallel.pipe, method.band_lengths
    if pipe > num_layers:
        raise UserError(
            f"parallel.pipe={pipe} is more than the model's {num_layers} layers; use fewer."
        )
    ends = list(accumulate(bands or [1] * num_layers))
    if parallel.pipe_layers is not None:
        return _checked(list(accumulate(parallel.pipe_layers)), parallel, ends, bands)
    if bands is not None:
        if len(bands) % pipe:
            raise UserError(
                f"parallel.pipe={pipe} does not divide method.balance_groups ({len(bands)} bands "
                f"of layers {list(bands)}): a pipe stage must hold whole bands; set "
                f"method.balance_groups to a multiple of {pipe} (it is part of the method: the "
                f"plans change), or parallel.pipe to a divisor of {len(bands)}."
            )
        share = len(bands) // pipe
        return ends[share - 1 :: share]
    return _cheapest(_schedule_costs(method, **size), pipe)


def pipe_stage_costs(method: Method, phase: int, cuts: list[int], **size: Any) -> list[float]:
    """Mean model FLOPs of every pipe stage in the steps of a phase."""
    loads = method.computed(method.mean_loads(phase))
    layers, head = flops_by_layer(method.shape, loads, StepSize(**size))
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
    cuts: list[int], parallel: Parallel, ends: list[int], bands: tuple[int, ...] | None
) -> list[int]:
    if cuts[-1] != ends[-1]:
        raise UserError(
            f"parallel.pipe_layers={parallel.pipe_layers} adds up to {cuts[-1]}, and the model has "
            f"{ends[-1]} layers; give numbers that add up to {ends[-1]}."
        )
    if not set(cuts) <= set(ends):
        raise UserError(
            f"parallel.pipe_layers={parallel.pipe_layers}: a pipe stage must hold whole bands, and "
            f"method.balance_groups makes bands of {list(bands or ())} layers; end every stage "
            f"where a band ends: after {', '.join(map(str, ends))} layers."
        )
    return cuts


def _schedule_costs(method: Method, **size: Any) -> list[list[float]]:
    """Model FLOPs of every phase, of every layer; the head's with the last layer's."""
    costs = []
    for i, phase in enumerate(method.phases):
        loads = method.computed(method.mean_loads(i))
        layers, head = flops_by_layer(method.shape, loads, StepSize(**size))
        steps = phase.until_step - phase.from_step
        costs.append([steps * layer.model for layer in layers])
        costs[-1][-1] += steps * head
    return costs


# The costliest range of the first layers in every phase, then the ranges' squares; and their ends.
Beginning = tuple[tuple[float, ...], tuple[int, ...]]


def _cheapest(costs: list[list[float]], pipe: int) -> list[int]:
    """Ends of `pipe` ranges of layers such that the costliest ranges of all phases together cost
    least; then, the more equal ones.

    Exact: of the beginnings with one end only those are left out that another one equals or beats
    in every phase, whatever comes behind it, and those that must cost more than a known cut.

    Args:
        costs: of every phase, of every layer.
    """
    before = [[0.0, *accumulate(phase)] for phase in costs]
    num_layers = len(before[0]) - 1
    even = [(i + 1) * num_layers // pipe for i in range(pipe)]
    limit = sum(max(sums[b] - sums[a] for a, b in pairwise([0, *even])) for sums in before)
    for at_most in (1, None):
        # Not below the sum itself, whatever the rounding.
        if (found := _search(before, pipe, limit * (1 + 1e-9), at_most)) is not None:
            limit, cuts = sum(found[0][:-1]), list(found[1])
    return cuts


def _search(
    before: list[list[float]], pipe: int, limit: float, at_most: int | None
) -> Beginning | None:
    """The best cut that costs no more than `limit`, if there is one; with `at_most` beginnings
    kept for an end it may be another one, or none."""
    num_layers = len(before[0]) - 1
    best: dict[int, list[Beginning]] = {0: [((0.0,) * (len(before) + 1), ())]}
    for left in reversed(range(pipe)):  # stages behind this one, each of a layer or more
        found: dict[int, list[Beginning]] = {}
        for end in range(pipe - left, num_layers - left + 1) if left else [num_layers]:
            rest = [(sums[-1] - sums[end]) / max(1, left) for sums in before]
            longer = []
            for start in reversed(range(end)):
                own = [sums[end] - sums[start] for sums in before]
                if sum(own) > limit:  # and so do longer ranges
                    break
                longer += [_lengthened(b, own, end) for b in best.get(start, ())]
            within = [b for b in longer if sum(map(max, b[0], rest)) <= limit]
            found[end] = _unbeaten(within)[:at_most]
        best = found
    return next(iter(best[num_layers]), None)


def _lengthened(beginning: Beginning, costs: list[float], end: int) -> Beginning:
    (*worst, squares), cuts = beginning
    return (*map(max, worst, costs), squares + sum(c * c for c in costs)), (*cuts, end)


def _unbeaten(beginnings: list[Beginning]) -> list[Beginning]:
    """Those that no other equals or beats in every number, the cheapest first."""
    kept: list[Beginning] = []
    for candidate in sorted(beginnings, key=lambda b: (sum(b[0][:-1]), b)):
        if not any(all(map(le, other[0], candidate[0])) for other in kept):
            kept.append(candidate)
    return kept
