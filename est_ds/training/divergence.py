"""What a run does about losses and gradients that are no number, and about losses that jump.

A step with such a gradient is never applied: weights, moments and AdamW's count of steps stay. What
follows is the policy's (`divergence` of the run file). A step that is left out keeps its place: the
next one has the plan, the data and the learning rate that it would have had.

Every rank has a history of its own and the same loss and gradient norm, which are reduced over all
of them, so all decide alike without a message.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from statistics import median
from typing import Literal

from est_ds.checkpoints.state import Seen
from est_ds.config.sections import Divergence
from est_ds.errors import Diverged

# A median absolute deviation times this is a standard deviation, of normal values.
TO_SIGMA = 1.4826

Action = Literal["go on", "skip", "roll back"]


class History:
    """What has happened to a run so far, as a checkpoint holds it.

    Args:
        settings: the policy.
        boundaries: first steps of phases, of the method's or of the data's: losses of different
            phases are not compared.
        seen: at the checkpoint that the run resumes from.

    Attributes:
        skipped: steps that are not trained, each with the reason.
        spike: what the last judged loss was, if it was a spike.
    """

    def __init__(
        self,
        settings: Divergence,
        boundaries: Collection[int],
        seen: Seen | None = None,
    ) -> None:
        self._settings, self._boundaries = settings, frozenset(boundaries)
        seen = seen or Seen()
        self._losses = deque(seen.losses, maxlen=settings.window)
        self.skipped = dict(seen.skipped)
        self.spike: str | None = None

    @property
    def seen(self) -> Seen:
        """What a checkpoint holds of it."""
        return Seen(losses=tuple(self._losses), skipped=dict(self.skipped))

    def begin(self, step: int) -> bool:
        """Begins a step, each in its turn; returns whether it is to be trained."""
        self.spike = None
        if step in self._boundaries:
            self._losses.clear()
        return step not in self.skipped

    def judge(self, step: int, loss: float, grad_norm: float) -> Action:
        """What to do after a step that was computed; a step to leave out is then in `skipped`.

        Args:
            loss: mean of all replicas.
            grad_norm: of all ranks, before clipping.

        Raises:
            Diverged: the policy is to stop, or allows no more.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            reason = (
                "the gradients are no numbers" if math.isfinite(loss) else f"the loss is {loss}"
            )
            return self._refuse(step, reason, self._settings.nonfinite)
        limit = self._limit()
        if loss > limit:
            self.spike = f"the loss {loss:.4f} is a spike (above {limit:.4f})"
            if self._settings.spikes == "rollback":
                return self._refuse(step, self.spike, "rollback")
        self._losses.append(loss)
        return "go on"

    def go_back(self, seen: Seen) -> None:
        """Goes back to the losses of a checkpoint; steps found since stay skipped."""
        self._losses = deque(seen.losses, maxlen=self._settings.window)

    def _limit(self) -> float:
        """The largest loss that is no spike: k robust deviations above the median."""
        if len(self._losses) < self._settings.window / 2:
            return math.inf
        middle = median(self._losses)
        deviation = TO_SIGMA * median(abs(loss - middle) for loss in self._losses)
        # Zero when most losses are equal: nothing can be said of the others.
        return middle + self._settings.deviations * deviation if deviation else math.inf

    def _refuse(self, step: int, reason: str, policy: str) -> Action:
        allowed = self._settings.allowed
        if policy == "stop":
            raise Diverged(
                f"step {step}: {reason}; the step was not applied. Set divergence.nonfinite=skip "
                f"or rollback and start the run again: it resumes from its last checkpoint. A "
                f"lower optimizer.lr, or precision=fp32, needs a new run_dir."
            )
        if len(self.skipped) >= allowed:
            raise Diverged(
                f"step {step}: {reason}, and {allowed} steps have been skipped already "
                f"(divergence.limit). Look at their data and at the learning rate; a higher "
                f"divergence.limit lets the run go on from its last checkpoint."
            )
        self.skipped[step] = reason
        return "skip" if policy == "skip" else "roll back"
