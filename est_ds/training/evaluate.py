"""Held-out loss of the full model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from est_ds.engine.base import Engine
from est_ds.run.prepare import Run

# Micro-batches a pipe stage between two looks for a notice.
AT_ONCE = 8


def evaluate(
    run: Run, engine: Engine, step: int, interrupted: Callable[[], bool] | None = None
) -> dict[str, float] | None:
    """Returns the mean held-out loss of the full model on each held-out corpus, in nats per token;
    the same in every layout.

    A model that still grows is evaluated as deep as it is at `step` (`Method.depth`).

    Args:
        interrupted: asked by every rank from time to time; once it says so, the result is None.
    """
    config, losses = run.config, {}
    part = AT_ONCE * config.parallel.pipe  # a pipeline fills and drains for each
    whole = run.method.whole(step)
    for name, windows in run.valid.items():
        batches = list(windows.held_out(config.evaluate.sequences, engine.portion))
        rows = len(batches) * config.batch.micro * engine.num_replicas
        losses[name] = 0.0
        for begin in range(0, len(batches), part):
            if interrupted and interrupted():
                return None
            some = batches[begin : begin + part]
            with engine.subnetwork.active(whole) if whole else nullcontext():
                losses[name] += engine.mean_loss(some) * len(some) / len(batches)
        losses[name] *= rows / config.evaluate.sequences
    return losses
