"""Held-out losses, of the full model or of a subnetwork."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np

from est_ds.engine.base import Engine
from est_ds.engine.loss import RowLosses
from est_ds.plans.plan import Plan
from est_ds.ranks.gather import gathered_on_rank_0
from est_ds.run.prepare import Run
from est_ds.run.windows import WindowLosses

# Micro-batches a pipe stage between two looks for a notice.
AT_ONCE = 8

Interrupted = Callable[[], bool] | None


@dataclass(frozen=True)
class HeldOut:
    """An evaluation.

    Attributes:
        losses: mean over the targets of each held-out corpus, nats per token; the same in every
            layout.
        windows: where `evaluate.windows` asks for them, of each corpus; on rank 0.
    """

    losses: dict[str, float]
    windows: dict[str, WindowLosses] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean over the corpora."""
        return sum(self.losses.values()) / len(self.losses)


def evaluate(
    run: Run, engine: Engine, step: int, interrupted: Interrupted = None
) -> HeldOut | None:
    """Evaluates the full model on each held-out corpus.

    A model that still grows is evaluated as deep as it is at `step` (`Method.depth`).

    Args:
        interrupted: asked by every rank from time to time; once it says so, the result is None.
    """
    noted = engine.loss.noted() if run.config.evaluate.windows else nullcontext()
    with noted as rows:
        losses = held_out(run, engine, run.method.whole(step), interrupted)
    if losses is None:
        return None
    return HeldOut(losses, {} if rows is None else _windows(run, engine, rows))


def held_out(
    run: Run, engine: Engine, plan: Plan | None, interrupted: Interrupted = None
) -> dict[str, float] | None:
    """Returns the mean loss on each held-out corpus of what a plan keeps; None keeps everything."""
    config, losses = run.config, {}
    part = AT_ONCE * config.parallel.pipe  # a pipeline fills and drains for each
    for name, windows in run.valid.items():
        batches = list(windows.held_out(config.evaluate.sequences, engine.portion))
        rows = len(batches) * config.batch.micro * engine.num_replicas
        losses[name] = 0.0
        for begin in range(0, len(batches), part):
            if interrupted and interrupted():
                return None
            some = batches[begin : begin + part]
            with engine.subnetwork.active(plan) if plan else nullcontext():
                losses[name] += engine.mean_loss(some) * len(some) / len(batches)
        losses[name] *= rows / config.evaluate.sequences
    return losses


def _windows(run: Run, engine: Engine, rows: RowLosses) -> dict[str, WindowLosses]:
    """Puts the rows of all replicas in the order of the windows, on rank 0; nothing elsewhere."""
    everyone = gathered_on_rank_0((engine.replica, rows.losses, rows.targets))
    by_replica = {replica: (losses, targets) for replica, losses, targets in everyone if losses}
    if not by_replica:
        return {}
    micro, count = run.config.batch.micro, run.config.evaluate.sequences
    shape = len(by_replica), len(run.valid), -1, micro
    each = []
    for values in zip(*(by_replica[replica] for replica in sorted(by_replica))):
        # Micro-batches go round the replicas (`Windows.held_out`).
        in_order = np.array(values).reshape(shape).transpose(1, 2, 0, 3)
        each.append(in_order.reshape(len(run.valid), -1)[:, :count])
    return {
        name: WindowLosses(losses, targets, np.array(windows.held_out_samples(count)))
        for (name, windows), losses, targets in zip(run.valid.items(), *each)
    }
