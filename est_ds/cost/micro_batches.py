"""Micro-batches that a run can take in a layout."""

from __future__ import annotations

import math

from est_ds.config.run_config import RunConfig

LEAST = 4  # micro-batches for every pipe stage that are kept, since fewer leave it waiting


def micro_batches(config: RunConfig, processes: int, least: int = LEAST) -> list[int]:
    """Returns the micro-batches that divide a replica's share of the batch, largest first.

    A pipeline keeps some micro-batches a stage, or all that there are; `method.draw: micro_batch`
    keeps two in the whole batch.

    Args:
        least: micro-batches for every pipe stage; 0: any number, for who counts how long it waits.

    Raises:
        UserError: the replicas do not divide the batch, or the stages the processes.
    """
    replicas, pipe = config.data_parallel(processes), config.parallel.pipe
    share = config.with_micro(1).batch.accumulation(replicas)
    fewest = min(share, least * pipe) if pipe > 1 else 1
    if config.method.get("draw") == "micro_batch" and replicas == 1:
        fewest = max(fewest, min(share, 2))
    return [m for m in reversed(divisors(share)) if share // m >= fewest]


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number, smallest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
