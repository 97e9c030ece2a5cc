"""A short version of a run, and where to kill it."""

from __future__ import annotations

from typing import Any

from est_ds.config.run_config import RunConfig
from est_ds.config.strict import checked
from est_ds.design import make_design
from est_ds.errors import UserError
from est_ds.plans.phases import Phase

DEFAULT_STEPS = (12, 24, 48, 96)
LOST_STEPS = 2  # between the checkpoint and the phase boundary behind it

# Settings of the DeepSpeed section that would show the short run to others as if it were one.
MONITORS = ("tensorboard", "wandb", "comet", "csv_monitor")


def shortened(config: RunConfig, steps: int | None) -> RunConfig:
    """The run in few steps, with all its phases: what stands at a step moves in proportion.

    Args:
        steps: None takes the first of a few small numbers in which every phase has a step.

    Raises:
        UserError: the run's settings do not fit into so few steps, or its micro-batch is still to
            be found.
    """
    if config.batch.is_auto:
        raise UserError("batch.micro=auto: verify-resume needs a number; add batch.micro=N.")
    tried = [steps] if steps else [n for n in DEFAULT_STEPS if n < config.steps] or [config.steps]
    for i, number in enumerate(tried, start=1):
        try:
            short = _in_steps(config, number)
            make_design(short)
            return short
        except UserError as e:
            if i == len(tried):
                raise UserError(
                    f"the run in {number} steps: {e} Choose other --steps (2 to {config.steps})."
                ) from None
    raise AssertionError("there is always a number to try")


def default_cut(phases: tuple[Phase, ...], steps: int) -> int:
    """The checkpoint to resume from: near the middle, with a phase boundary still to come."""
    ends = [phase.until_step for phase in phases if phase.until_step < steps]
    if not ends:
        return steps // 2
    boundary = next((end for end in ends if 2 * end >= steps), ends[-1])
    return max(1, boundary - LOST_STEPS)


def _in_steps(config: RunConfig, steps: int) -> RunConfig:
    if not 2 <= steps <= config.steps:
        raise UserError(
            f"--steps={steps}: the short version must have at least 2 steps, and no more than the "
            f"{config.steps} of the run; use 2 to {config.steps}."
        )
    tree = config.model_dump(mode="json", by_alias=True)
    if steps != config.steps:
        phases = [*tree["method"].get("phases", []), *tree["data"]["phases"]]
        if rewarm := tree["schedule"]["rewarm"]:
            rewarm["steps"] = _fraction(rewarm["steps"], config.steps)
            if round(rewarm["steps"] * steps) < 2:
                tree["schedule"]["rewarm"] = None  # nothing is left of it
        for section in (tree["schedule"], tree["method"], *phases):
            for field in {"warmup", "decay", "until"} & section.keys():
                section[field] = _fraction(section[field], config.steps)
    tree["steps"] = steps
    tree["start"] = None  # the short run is no branch
    tree["evaluate"] |= {"every": steps, "windows": False, "boundaries": False}
    tree["log"] = {"every": 1, "to": [], "step_times": False}
    tree["resume"] = "auto"
    tree["checkpoint"] |= {"copy_to": None, "copy_required": False, "copy_wait_s": None}
    tree["deepspeed"] = {k: v for k, v in tree["deepspeed"].items() if k not in MONITORS}
    return checked(RunConfig, tree)


def _fraction(position: Any, steps: int) -> Any:
    """A step as a fraction of the run; all else, fractions and what is wrong, as it is."""
    return position / steps if type(position) is int and position else position
