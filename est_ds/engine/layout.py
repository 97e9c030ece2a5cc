"""Which pipe stage owns which layers."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from est_ds.errors import UserError
from est_ds.plans.methods.base import Method


def pipe_cuts(method: Method, pipe: int) -> list[int]:
    """Ends of the layer ranges of the pipe stages, cut where the method balances.

    Raises:
        UserError: the cuts would not fall on ends of the method's runs of layers.
    """
    num_layers = method.shape.num_layers
    if pipe > num_layers:
        raise UserError(
            f"parallel.pipe={pipe} is more than the model's {num_layers} layers; use fewer."
        )
    if method.run_lengths is None:
        short, longer = divmod(num_layers, pipe)
        return list(accumulate(short + (i < longer) for i in range(pipe)))
    runs = list(method.run_lengths)
    if len(runs) % pipe:
        raise UserError(
            f"parallel.pipe={pipe} does not divide method.balance_groups ({len(runs)} runs of "
            f"layers {runs}): a pipe stage must hold whole runs; set method.balance_groups to a "
            f"multiple of {pipe} (it is part of the method: the plans change), or parallel.pipe to "
            f"a divisor of {len(runs)}."
        )
    share = len(runs) // pipe
    return list(accumulate(sum(runs[i : i + share]) for i in range(0, len(runs), share)))


def pipe_stage(cuts: list[int], layer: int) -> int:
    """The pipe stage that owns a layer, from the cuts of `pipe_cuts`."""
    return bisect_right(cuts, layer)
