"""A run: the sections of its file, and what must hold between them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from est_ds.config.corpora import Data
from est_ds.config.kinds import PathText, Positive
from est_ds.config.schedule import AnySchedule, Cosine
from est_ds.config.sections import (
    Batch,
    Checkpoint,
    Divergence,
    Evaluate,
    Log,
    Optimizer,
    Parallel,
    Seed,
    Seeds,
    Watchdog,
)
from est_ds.config.start import Start
from est_ds.config.strict import Strict
from est_ds.config.yaml12 import dump
from est_ds.errors import UserError


def steps_of_tokens(tokens: float, per_step: int, step: int = 0, before: int = 0) -> int:
    """Steps of a run that reads so many tokens: the fewest that read them all.

    Args:
        per_step: tokens of a step.
        step: the first step of which that is so.
        before: tokens read by then.
    """
    return step + int(-((before - int(tokens)) // per_step))


def _steps_or_tokens(schema: dict[str, Any]) -> None:
    """A run file says one of the two."""
    schema["required"].remove("steps")
    schema["oneOf"] = [{"required": ["steps"]}, {"required": ["tokens"]}]


class RunConfig(Strict):
    """One run. The sections `model`, `method` and `objective` are checked by the family, the method
    and the objective.

    Attributes:
        run_dir: folder of the run, made when it is first trained.
        seed: of the first weights, the data order and the method's draws.
        seeds: seeds of their own for some of these.
        steps: optimizer steps of the whole run; in their place `tokens` may stand.
        tokens: that the whole run reads, instead of `steps`: rounded up to whole steps. It is not
            in the resolved config, which says the steps.
        precision: of weights and activations; sums of gradients and the optimizer's state are
            float32 in both.
        model: a Hugging Face config.
        method: what a step trains.
        objective: how tokens become inputs and targets.
        data: corpora and tokenizer.
        batch: sequences of a step.
        parallel: how the model lies over the processes.
        optimizer: AdamW.
        schedule: how the learning rate goes over the steps.
        checkpoint: when the run is saved.
        resume: `auto`: from the newest good checkpoint; `latest`: from the one that the file
            `checkpoints/latest` names, or not at all.
        evaluate: held-out loss.
        log: what is logged.
        watchdog: when a run that hangs is ended.
        divergence: what happens to losses that are no numbers, or that jump.
        activation_checkpointing: layers keep their inputs alone for the backward, and compute the
            rest anew.
        compile: every layer is compiled (torch.compile).
        deepspeed: keys of DeepSpeed's own config that est_ds does not set.
        start: where a branch begins; `est-ds branch` writes it, and nobody else.
    """

    model_config = ConfigDict(json_schema_extra=_steps_or_tokens)

    run_dir: PathText
    seed: Seed = 0
    seeds: Seeds = Seeds()
    steps: Positive
    tokens: Positive | Annotated[float, Field(ge=1.0)] | None = Field(None, exclude=True)
    precision: Literal["fp32", "bf16"] = "fp32"
    model: dict[str, Any]
    method: dict[str, Any]
    objective: dict[str, Any] = {"name": "causal"}
    data: Data
    batch: Batch
    parallel: Parallel = Parallel()
    optimizer: Optimizer
    schedule: AnySchedule = Cosine()
    checkpoint: Checkpoint
    resume: Literal["auto", "latest"] = "auto"
    evaluate: Evaluate
    log: Log = Log()
    watchdog: Watchdog = Watchdog()
    divergence: Divergence = Divergence()
    activation_checkpointing: bool = False
    compile: bool = False
    deepspeed: dict[str, Any] = {}
    start: Start | None = None

    @model_validator(mode="before")
    @classmethod
    def _tokens_say_the_steps(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("tokens") is None:
            return tree
        if tree.get("steps") is not None:
            raise ValueError(
                f"steps={tree['steps']} and tokens={tree['tokens']} both say how long the run is; "
                f"remove one of them"
            )
        try:
            start = tree.get("start") or {"step": 0, "tokens": 0}
            per_step = tree["batch"]["global"] * tree["data"]["sequence"]
            steps = steps_of_tokens(tree["tokens"], per_step, start["step"], start["tokens"])
        except (KeyError, TypeError, ValueError, ArithmeticError):
            steps = 1  # one of these fields is wrong, and will say so
        return {**tree, "steps": max(1, steps)}

    @field_validator("tokens")
    @classmethod
    def _tokens_are_whole(cls, value: int | float | None) -> int | None:
        if value is not None and value != int(value):
            raise ValueError("write a whole number, such as 50e9")
        return value if value is None else int(value)

    @model_validator(mode="after")
    def _start_fits(self) -> RunConfig:
        if self.start is None:
            return self
        if self.start.step >= self.steps:
            raise ValueError(f"start.step={self.start.step} is not before steps={self.steps}")
        reading, parts = self.start.reading, self.data.parts
        if reading is not None and len(reading.samples) != len(parts):
            raise ValueError(
                f"start.reading.samples has {len(reading.samples)} numbers for the {len(parts)} "
                f"corpora of data.train"
            )
        return self

    @property
    def first_step(self) -> int:
        """The first step that the run trains."""
        return self.start.step if self.start else 0

    def tokens_after(self, steps: int) -> int:
        """Tokens read by the end of so many steps, those before the run's first one included."""
        before = self.start.tokens if self.start else 0
        return before + (steps - self.first_step) * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_ * self.data.sequence

    def at(self, field: str) -> Any:
        """The value of a field by its dotted name."""
        value: Any = self
        for name in field.split("."):
            value = getattr(value, name)
        return value

    def seed_of(self, part: Literal["model", "data", "method"]) -> int:
        """The seed of a part: its own, or that of all."""
        own = getattr(self.seeds, part)
        return self.seed if own is None else own

    def with_micro(self, micro: int) -> RunConfig:
        """The run with a number for `batch.micro`."""
        batch = Batch.model_validate({"global": self.batch.global_, "micro": micro})
        return self.model_copy(update={"batch": batch})

    def data_parallel(self, processes: int) -> int:
        """Replicas of the model: processes / pipe.

        Raises:
            UserError: parallel.pipe does not divide the processes.
        """
        if processes % self.parallel.pipe:
            raise UserError(
                f"parallel.pipe={self.parallel.pipe} does not divide {processes} processes; start "
                f"a multiple of {self.parallel.pipe} (--processes), or change parallel.pipe."
            )
        return processes // self.parallel.pipe

    def layout(self, processes: int) -> dict[str, int]:
        """What the files of a checkpoint depend on."""
        replicas = self.data_parallel(processes)
        return {"pipe": self.parallel.pipe, "zero": self.parallel.zero, "replicas": replicas}

    def to_yaml(self) -> str:
        return dump(self.model_dump(mode="json", by_alias=True))
