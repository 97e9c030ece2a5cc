"""All ranks must draw the same plans and read the same data.

DeepSpeed would silently mix gradients of different layers, or hang. Plans and batches are functions
of the step, so the ranks compare those of the steps ahead before they train them: at the start, at
every checkpoint and at every phase change, and at no cost in between.
"""

from __future__ import annotations

from collections.abc import Callable

from est_ds.errors import Failure
from est_ds.plans.plan import Plan, StepPlans
from est_ds.ranks.gather import gathered_on_rank_0, is_same_on_all, of_rank_0, on_threads
from est_ds.run.prepare import Run


def segment_end(run: Run, step: int) -> int:
    """First step after `step` at which the ranks compare again."""
    every, phases = run.config.checkpoint.every, run.method.phases
    ends = [phase.until_step for phase in phases if phase.until_step > step]
    return min([(step // every + 1) * every, *ends])


def check_agreement(run: Run, step: int) -> None:
    """Compares the steps from `step` to the next comparison. Every rank calls it.

    Raises:
        Failure: ranks differ; all raise it.
    """
    until = min(segment_end(run, step), run.config.steps)
    mine = [(_one_of(run.plans(s)).digest, run.train.digest(s)) for s in range(step, until)]
    if is_same_on_all(str(mine)):
        return
    text = of_rank_0(_difference(gathered_on_rank_0(mine), step))
    assert text is not None, "digests differ and are equal"
    raise Failure(text)


def _difference(everyone: list[list[tuple[str, str]]], step: int) -> str | None:
    """What the ranks disagree about first, and which.

    Args:
        everyone: of every rank the digests of plan and data, from `step` on.
    """
    for i, of_step in enumerate(zip(*everyone)):
        for digests, what in zip(zip(*of_step), ("plan", "data")):
            odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            if odd:
                named = ", ".join(f"rank {rank}: {digests[rank]}" for rank in (0, *odd[:8]))
                ranks = str(odd[:64])[:-1] + (", ...]" if len(odd) > 64 else "]")
                return (
                    f"ranks {ranks} disagree with rank 0 about the {what} of step {step + i} "
                    f"(digests: {named}): they run another version of est_ds, of the run file or "
                    f"of the corpus. Make them equal on every node and start again."
                )
    return None


def _one_of(plans: StepPlans) -> Plan:
    """Of a step's plans one, another at every step: to draw all of them takes too long."""
    return plans[plans.step % len(plans)]


def check_hashes(run: Run, reads: bool, goes_on: Callable[[], None]) -> None:
    """Compares every byte of the corpora with their manifests. Every rank calls it.

    Args:
        reads: whether this rank does it: one of every node.
        goes_on: called every second while any rank reads.

    Raises:
        UserError: a file was altered, or a corpus has no manifest; all raise it.
    """
    on_threads(run.check_hashes if reads else None, goes_on)
