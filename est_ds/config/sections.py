"""The settings of a run: strict, frozen models, and one clear error for wrong input."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from est_ds.config.kinds import BucketUrl, Positive
from est_ds.config.strict import Strict
from est_ds.errors import UserError

AUTO = "auto"


def _or_auto(schema: dict[str, Any]) -> None:
    """What a run file may say in the place of a whole number."""
    number = {name: schema.pop(name) for name in ("type", "minimum")}
    schema["anyOf"] = [number, {"const": AUTO}]


class Batch(Strict):
    """Sequences: global = micro x accumulation x data_parallel.

    Attributes:
        global: sequences of a step, over all replicas.
        micro: sequences that a replica computes at once; `auto`: the most that fit, found before
            the run begins, and kept.
    """

    global_: Positive = Field(alias="global")
    micro: Annotated[Positive, Field(json_schema_extra=_or_auto)]
    _is_auto: bool = PrivateAttr(False)

    @field_validator("micro", mode="before")
    @classmethod
    def _take_no_other_word(cls, micro: Any) -> Any:
        if isinstance(micro, str):
            raise ValueError(f"write a whole number, or {AUTO}")
        return micro

    @model_validator(mode="wrap")
    @classmethod
    def _take_auto(cls, tree: Any, handler: Any) -> Batch:
        is_auto = isinstance(tree, dict) and tree.get("micro") == AUTO
        batch: Batch = handler({**tree, "micro": 1} if is_auto else tree)
        batch._is_auto = batch._is_auto or is_auto
        return batch

    @property
    def is_auto(self) -> bool:
        """Whether `micro`, which is 1 then, is still to be found (`training.micro_batch`)."""
        return self._is_auto

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the global batch, over all replicas."""
        return self.global_ // self.micro

    def accumulation(self, data_parallel: int) -> int:
        """Micro-batches that one replica accumulates in a step.

        Raises:
            UserError: micro x data_parallel does not divide global.
        """
        share = self.micro * data_parallel
        if self.global_ % share:
            up, of_replica = -(-self.global_ // share) * share, self.global_ // data_parallel
            divides = self.global_ % data_parallel == 0
            smaller = f" or batch.micro={math.gcd(self.micro, of_replica)}" if divides else ""
            raise UserError(
                f"batch.global={self.global_} is not a multiple of batch.micro={self.micro} x "
                f"data_parallel={data_parallel} (global_batch = micro_batch x accumulation x "
                f"data_parallel); use batch.global={up}{smaller}, or another number of processes."
            )
        return self.global_ // share

    def equation(self, data_parallel: int) -> str:
        """Returns the batch equation with its numbers."""
        return (
            f"global_batch {self.global_} = micro_batch {self.micro} x accumulation "
            f"{self.accumulation(data_parallel)} x data_parallel {data_parallel}"
        )


class Parallel(Strict):
    """How the model and its state lie over the processes.

    Attributes:
        pipe: pipe stages that a replica of the model is cut into.
        zero: the ZeRO stage, which shards over the replicas.
        pipe_layers: layers of every pipe stage (default: cut by the FLOPs of every phase's busiest
            stage, head included).
        offload: optimizer state (and its step) is kept in host memory: ZeRO 2 and 3.
        processes: how many `est-ds train` starts on a machine without GPUs when --processes does
            not say (default: one replica).
    """

    pipe: Positive = 1
    zero: Annotated[int, Field(ge=0, le=3)] = 1
    pipe_layers: list[Positive] | None = None
    offload: bool = False
    processes: Positive | None = None

    @model_validator(mode="after")
    def _zero_fits_pipe(self) -> Parallel:
        if self.pipe > 1 and self.zero > 1:
            raise ValueError(
                f"zero={self.zero} with pipe={self.pipe}: DeepSpeed's pipeline works with ZeRO 0 "
                f"or 1; set parallel.zero=1, or parallel.pipe=1"
            )
        if self.pipe_layers is not None and len(self.pipe_layers) != self.pipe:
            raise ValueError(
                f"pipe_layers={self.pipe_layers} with pipe={self.pipe}: give one number of layers "
                f"for every pipe stage, or leave parallel.pipe_layers out"
            )
        if self.offload and self.zero < 2:
            raise ValueError(
                f"offload=True with zero={self.zero}: it works with ZeRO 2 and 3; set "
                f"parallel.zero=2 (and parallel.pipe=1), or parallel.offload=false"
            )
        return self


# Below 1, since AdamW divides by 1 - beta ** step.
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Optimizer(Strict):
    """AdamW.

    Attributes:
        lr: learning rate at its peak.
        betas: by which the two moments decay at every step.
        eps: added to the root of the second moment.
        weight_decay: share of a weight, times the learning rate, that a step takes off it.
        decay: `matrices`: weight decay is theirs alone, not that of norms and biases; `all`: of
            all parameters, as of TinyLlama's; `no_embeddings`: of matrices but embeddings, and so
            of no head that is tied to one.
        clip: a gradient of a larger norm, of all parameters, is scaled down to it; 0: none is.
        inactive: what the step's subnetwork leaves out has a zero gradient (`zero_grad`: its
            moments decay, and weight decay applies) or rests (`freeze`).
    """

    lr: Annotated[float, Field(gt=0.0)]
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    decay: Literal["matrices", "all", "no_embeddings"] = "matrices"
    clip: Annotated[float, Field(ge=0.0)] = 1.0
    inactive: Literal["zero_grad", "freeze"] = "zero_grad"

    @model_validator(mode="after")
    def _decay_takes_effect(self) -> Optimizer:
        if self.decay != "matrices" and not self.weight_decay:
            raise ValueError(
                f"decay={self.decay} has no effect with weight_decay=0; remove it, or raise that"
            )
        return self


class Checkpoint(Strict):
    """When the state of the run is saved, and what of it stays.

    Attributes:
        every: steps from one to the next; one is also written at every phase boundary.
        keep_last: the newest of them stay; 0: all.
        keep_every: so do those whose step is a multiple of it.
        keep_best: so does the one with the lowest held-out loss.
        asynchronous: they are written in the background, from a copy in host memory, where there is
            room for it.
        copy_to: each is also copied to this folder of a bucket in the background, and kept there
            by the same rules: `s3://BUCKET/FOLDER`, `gs://BUCKET/FOLDER` or `file:///FOLDER`, of
            this run alone. `resume: auto` looks there too.
        copy_required: a copy that is not done in time ends the run before the next checkpoint is
            written; without this it is tried again while the run goes on.
        copy_wait_s: seconds that the end of a run, or a notice, waits for the last copy, and with
            `copy_required` the next checkpoint for the former one's (default 600).
    """

    every: Positive
    keep_last: Annotated[int, Field(ge=0)] = 2
    keep_every: Positive | None = None
    keep_best: bool = True
    asynchronous: bool = True
    copy_to: BucketUrl | None = None
    copy_required: bool = False
    copy_wait_s: Annotated[float, Field(ge=0.0, le=1e9)] | None = None

    @model_validator(mode="after")
    def _copies_take_effect(self) -> Checkpoint:
        if self.copy_to is None and (self.copy_required or self.copy_wait_s is not None):
            field = "copy_required" if self.copy_required else "copy_wait_s"
            raise ValueError(
                f"{field}={getattr(self, field)} has no effect without copy_to; remove it, or set "
                f"copy_to"
            )
        return self

    @property
    def copy_limit_s(self) -> float:
        return 600.0 if self.copy_wait_s is None else self.copy_wait_s


class Evaluate(Strict):
    """The held-out loss of the full model.

    Attributes:
        every: steps from one evaluation to the next; the last step is followed by one.
        sequences: windows of each held-out corpus that are read.
        choice: `even`: the windows lie evenly over the corpus; `first`: they are its first ones.
            A new run gets `even` (`run_file.load_run`); the files of a run that began before the
            field was there do not have it, and it goes on as it did.
        windows: the loss of every window is saved too (`run.windows`).
        boundaries: before the first step of every phase but the first, the loss of the full model
            and of the subnetworks on both sides (`training.boundaries`). A method with one phase
            has no boundary, and nothing is done.
    """

    every: Positive
    sequences: Positive
    choice: Literal["even", "first"] = "first"
    windows: bool = False
    boundaries: bool = False


class Watchdog(Strict):
    """Ends the run on all nodes when a process makes no progress.

    Attributes:
        limit_s: seconds that a process may go without progress.
    """

    limit_s: Annotated[float, Field(ge=5.0, le=1e9)] = 600.0


class Divergence(Strict):
    """What happens when a loss or a gradient is no number, or when a loss jumps.

    Attributes:
        nonfinite: `stop` the run; `skip` the step; or `rollback`: go back to the last checkpoint,
            and leave that step out when it comes again.
        spikes: `report` a loss that is more than `deviations` robust standard deviations above the
            median of the last `window` ones of its phase, or `rollback`.
        deviations: how far above the median a loss is a spike.
        window: losses that the median is of.
        limit: steps that may be left out in the whole run (default 10); then it stops.
    """

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    spikes: Literal["report", "rollback"] = "report"
    deviations: Annotated[float, Field(gt=0.0)] = 6.0
    window: Annotated[int, Field(ge=16)] = 128
    limit: Positive | None = None

    @model_validator(mode="after")
    def _limit_takes_effect(self) -> Divergence:
        if self.limit is not None and self.nonfinite == "stop" and self.spikes == "report":
            raise ValueError(
                f"limit={self.limit} has no effect with nonfinite=stop and spikes=report, which "
                f"leave no step out; remove it, or set nonfinite=skip or rollback"
            )
        return self

    @property
    def rolls_back(self) -> bool:
        return "rollback" in (self.nonfinite, self.spikes)

    @property
    def allowed(self) -> int:
        return 10 if self.limit is None else self.limit


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Log(Strict):
    """What is logged, and where it is shown.

    Attributes:
        every: steps from one line of `metrics.jsonl` to the next.
        to: trackers that show the figures of these lines, and the config. TensorBoard's files are
            in the run directory; the others are extras of the package, and take their own
            environment variables.
        project: the W&B or trackio project, or MLflow experiment (default: what their variables
            say, or est_ds).
        step_times: after the last checkpoint the phases' steps are timed in turns
            (`training.turns`).
    """

    every: Positive = 1
    to: tuple[TrackerName, ...] = ("tensorboard",)
    project: Annotated[str, Field(min_length=1)] | None = None
    step_times: bool = True

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Log:
        if twice := [name for name in self.to if self.to.count(name) > 1]:
            raise ValueError(f"to names {twice[0]} more than once; name it once")
        if self.project is not None and not set(self.to) - {"tensorboard"}:
            raise ValueError(
                f"project={self.project!r} has no effect with to={list(self.to)}; remove it, or "
                f"add wandb, mlflow or trackio to log.to"
            )
        return self


Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Seeds(Strict):
    """Seeds of their own, in place of `seed`, for what a run draws.

    Attributes:
        model: the first weights.
        data: the order of the sequences, and what the objective draws of them.
        method: the plans, and the masks of dropout.
    """

    model: Seed | None = None
    data: Seed | None = None
    method: Seed | None = None
