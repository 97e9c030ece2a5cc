"""A run directory read: config, method, metrics."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from est_ds.config.run_config import RunConfig
from est_ds.config.run_file import load_run
from est_ds.cost.flops import computes_everything
from est_ds.design import make_outline
from est_ds.errors import UserError
from est_ds.plans.methods.base import Method
from est_ds.plans.phases import Phase
from est_ds.run.metrics import FILE, read_events, read_metrics
from est_ds.run.step_times import StepTimes, read_step_times

FIELDS = (
    "step",
    "phase",
    "loss",
    "tokens",
    "step_s",
    "flops_active",
    "flops_dense",
    "blocks_active",
    "blocks_dense",
)


@dataclass(frozen=True)
class RunFiles:
    """A run directory read: its config, its method and the lines of its metrics, in order; and what
    was measured in turns at its end, if that was."""

    directory: Path
    config: RunConfig
    method: Method
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    step_times: StepTimes | None

    @property
    def tokens_per_step(self) -> int:
        return self.config.tokens_per_step

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of which the run trains steps, from its own first one on."""
        first = self.config.first_step
        left = (phase for phase in self.method.phases if phase.until_step > first)
        return tuple(replace(phase, from_step=max(phase.from_step, first)) for phase in left)

    @property
    def steps_done(self) -> int:
        """Steps behind the run, trained or left out."""
        skipped = [e["step"] for e in self.events if "skipped" in e]
        return max(self.steps[-1]["step"], *skipped, -1) + 1

    def lines_of(self, phase: int) -> list[dict[str, Any]]:
        """The training lines of a phase, told by step since names may repeat."""
        within = self.method.phases[phase]
        return [e for e in self.steps if within.from_step <= e["step"] < within.until_step]

    def left_out(self, phase: Phase) -> list[int]:
        """Steps of a phase that were not trained."""
        steps = [e["step"] for e in self.events if "skipped" in e]
        return [step for step in steps if phase.from_step <= step < phase.until_step]

    def keeps_everything(self, phase: int) -> bool:
        """Whether every step of a phase computes the full model."""
        return computes_everything(self.method, phase, self.config.data.sequence)


def read_run(run_dir: str | os.PathLike) -> RunFiles:
    """Reads config and metrics of a run directory.

    Raises:
        UserError: it is no run directory, or its metrics are missing or incomplete.
    """
    directory = Path(run_dir)
    if not (directory / "config.yaml").is_file():
        raise UserError(
            f"run directory {str(run_dir)!r} has no config.yaml; give the directory of a run that "
            f"`est-ds train` has started (run_dir in its run file)."
        )
    config = load_run(directory)
    method = make_outline(config).method
    steps, evaluations = read_metrics(directory)
    if not steps:
        raise UserError(
            f"{directory / FILE} has no line of a training step; a line is written every "
            f"log.every={config.log.every} steps: train on with `est-ds train {run_dir}`."
        )
    for entry in steps:
        missing = [field for field in FIELDS if field not in entry]
        if missing:
            raise UserError(
                f"{directory / FILE}: the line of step {entry.get('step', 'unknown')} has no "
                f"{', '.join(missing)}; every line needs {', '.join(FIELDS)}: restore the file, or "
                f"train again in another run_dir."
            )
    events, times = read_events(directory), read_step_times(directory)
    files = RunFiles(directory, config, method, steps, evaluations, events, times)
    if not 0 <= steps[-1]["step"] < config.steps:
        raise UserError(
            f"{directory / FILE}: step {steps[-1]['step']} is beyond steps={config.steps} of "
            f"config.yaml; the two are of different runs: restore the one that belongs here."
        )
    for i, phase in enumerate(method.phases[: method.phase_at(steps[-1]["step"]) + 1]):
        is_before = phase.until_step <= config.first_step  # of a branch: the parent trained it
        if not is_before and not files.lines_of(i) and not files.left_out(phase):
            raise UserError(
                f"{directory / FILE} has no line of phase {phase.name!r} (steps {phase.from_step} "
                f"to {phase.until_step - 1}) though it has later ones; restore the whole file, or "
                f"train again in another run_dir."
            )
    return files
