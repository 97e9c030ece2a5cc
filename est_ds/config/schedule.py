"""The `schedule` section of a run file: how the learning rate goes over the steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from est_ds.config.kinds import Position, Share
from est_ds.config.strict import Strict


class Rewarm(Strict):
    """A linear rise of the rate from nearly 0 after every boundary between the method's phases.

    Attributes:
        steps: how long it lasts (a number of steps, or a fraction of the run).
        at: where it begins: at the boundaries between phases.
    """

    steps: Position
    at: Literal["boundaries"] = "boundaries"

    @field_validator("steps")
    @classmethod
    def _takes_effect(cls, value: int | float) -> int | float:
        if not value:
            raise ValueError("must be above 0; leave schedule.rewarm out for none")
        return value


class Schedule(Strict):
    """What all schedules begin with: a linear warm-up.

    Attributes:
        warmup: how long it lasts (a number of steps, or a fraction of the run).
        rewarm: another rise after every boundary between phases; none without it.
    """

    warmup: Position = 0.02
    rewarm: Rewarm | None = None


class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to `final` x lr.

    Attributes:
        final: what is left of the learning rate at the end, as a share of it.
    """

    name: Literal["cosine"] = "cosine"
    final: Share = 0.1


class Linear(Schedule):
    """Linear warm-up, then a straight line down to `final` x lr, as BERT's.

    Attributes:
        final: what is left of the learning rate at the end, as a share of it.
    """

    name: Literal["linear"]
    final: Share = 0.0


class InverseSqrt(Schedule):
    """Linear warm-up of W steps, then lr x sqrt(W / step), as the first Transformer's."""

    name: Literal["inverse_sqrt"]

    @field_validator("warmup")
    @classmethod
    def _has_a_warmup(cls, value: int | float) -> int | float:
        if not value:
            raise ValueError(
                "inverse_sqrt needs a warm-up: its rate is lr x sqrt(warmup / step); set it above 0"
            )
        return value


class Wsd(Schedule):
    """Linear warm-up, a stable stretch, then a decay to `final` x lr.

    Attributes:
        decay: how long the decay lasts (a number of steps, or a fraction of the run).
        shape: it is `linear`, or goes with 1 - the root of its share that is done (`sqrt`).
        final: what is left of the learning rate at the end, as a share of it.
    """

    name: Literal["wsd"]
    decay: Position = 0.2
    shape: Literal["linear", "sqrt"] = "linear"
    final: Share = 0.1

    @model_validator(mode="after")
    def _shape_takes_effect(self) -> Wsd:
        if self.shape != "linear" and not self.decay:
            raise ValueError(f"shape={self.shape} has no effect with decay=0; remove one of them")
        return self


AnySchedule = Annotated[Cosine | Linear | InverseSqrt | Wsd, Field(discriminator="name")]
