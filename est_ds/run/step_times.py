"""`step_times.json`: seconds of steps that were measured in turns, so that they may be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from est_ds.config.strict import Stored
from est_ds.disk import replace_text

FILE = "step_times.json"
# Of the processors: a machine on which other processes use more is called busy.
BUSY = 0.1


class Turns(Stored):
    """What takes a turn: a phase of a run, or its full model. One number a round.

    Attributes:
        run: the run's name, where there are several.
        name: the phase's.
        phase: its number; None: the full model, which no phase trains.
        num_steps: steps of the run in it.
        wall_s: wall-clock, of rank 0.
        cpu_s: processor seconds, the sum of all processes.
        device_s: between two events of rank 0's GPU; None on CPUs.
    """

    run: str
    name: str
    phase: int | None
    num_steps: int
    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    device_s: tuple[float, ...] | None = None

    @property
    def step_s(self) -> tuple[float, ...]:
        """What is compared: the GPU's seconds, or wall-clock."""
        return self.wall_s if self.device_s is None else self.device_s


class StepTimes(Stored):
    """Steps of several designs, or of the phases of one, measured in turns.

    Attributes:
        turns: in the order of a round; the first is what the others are compared with.
        processors: of the node on which other processes used most.
        others: processors that other processes used there, on average.
        layout: what the times depend on besides the plans.
    """

    turns: tuple[Turns, ...]
    processors: int
    others: float
    layout: dict[str, Any]

    @property
    def baseline(self) -> Turns:
        return self.turns[0]

    @property
    def num_rounds(self) -> int:
        return len(self.baseline.wall_s)

    @property
    def is_busy(self) -> bool:
        """Whether other processes used so much of the machine that times may have suffered."""
        return self.others > BUSY * self.processors

    def of_phase(self, phase: int) -> Turns | None:
        """What a phase measured, where there is one run; None if it was not measured."""
        return next((t for t in self.turns if t.phase == phase), None)

    def ratios(self, turns: Turns, of: str = "step_s") -> list[float]:
        """Of every round, the seconds of a step over those of the baseline's.

        Args:
            of: `step_s`, `wall_s` or `cpu_s`.
        """
        pairs = zip(getattr(turns, of), getattr(self.baseline, of), strict=True)
        return [own / full for own, full in pairs]

    def run_ratios(self, run: str, of: str = "step_s") -> list[float]:
        """Of every round, the seconds of all steps of a run over those of as many of the
        baseline's."""
        phases = [t for t in self.turns if t.run == run and t.num_steps and t.phase is not None]
        total = sum(t.num_steps for t in phases)
        rounds = zip(*(self.ratios(t, of) for t in phases), strict=True)
        return [
            sum(t.num_steps * ratio for t, ratio in zip(phases, ratios)) / total
            for ratios in rounds
        ]

    def write(self, file: Path) -> None:
        """Saves it whole, or not at all."""
        replace_text(file, self.model_dump_json(indent=1) + "\n")


def read_step_times(run_dir: Path) -> StepTimes | None:
    """Returns what was measured at the end of a run; None of one that was not, or of another
    version's file."""
    try:
        return StepTimes.model_validate_json((run_dir / FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
