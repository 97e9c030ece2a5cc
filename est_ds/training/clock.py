"""What steps took, also over all starts of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """What a step took.

    Attributes:
        step_s: wall-clock seconds.
        cpu_s: processor seconds of this process.
        trained_s: what all steps up to it took; None where that is not known.
    """

    step_s: float
    cpu_s: float
    trained_s: float | None


class Clock:
    """Adds up what steps took.

    Time that led nowhere does not count: that of steps which a crash or a rollback lost, as little
    as their tokens do. Nor do starts, evaluations and checkpoints.

    Args:
        trained_s: by the checkpoint that the run goes on from; None where it does not know.
    """

    def __init__(self, trained_s: float | None) -> None:
        self.trained_s = trained_s

    def ran(self, step_s: float, cpu_s: float) -> Times:
        """Counts a step."""
        if self.trained_s is not None:
            self.trained_s += step_s
        return Times(step_s, cpu_s, self.trained_s)

    def go_back(self, trained_s: float | None) -> None:
        """Goes back to what a checkpoint says."""
        self.trained_s = trained_s
