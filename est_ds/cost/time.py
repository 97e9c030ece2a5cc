"""Seconds of a training step on GPUs, before one is rented. No torch.

A micro-batch takes the time of its matrix products at a share of the peak rate, and of what goes
through the GPU's memory beside them: norms, residuals, activations (by kept layers, not by what a
kept layer keeps), logits and loss. A step adds the optimizer, which a subnetwork does not make
smaller, the pipeline's waiting, and communication. So FLOPs that are saved are not saved seconds.

The five constants are least squares of nine step times of this engine on an H200
(tests/benchmarks/README.md), with errors up to 3 %; `PUBLISHED` is what others reached. The start
of kernels is not counted: steps of micro-batches below some thousand tokens take longer. Nor are
evaluations and checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from est_ds.config.deepspeed_keys import reduces_flat
from est_ds.config.run_config import RunConfig
from est_ds.cost.flops import StepSize, flops_by_layer, gradient_share, step_flops
from est_ds.cost.gpus import LINK_SHARE, Gpu
from est_ds.cost.parameters import PieceSize, layer_parameters, pipe_stage_pieces, total_parameters
from est_ds.cost.peaks import mfu
from est_ds.errors import UserError
from est_ds.plans.methods.base import Load, Method, full_loads

# Share of the peak rate that matrix products reach.
PEAK_SHARE = 0.67
# Bytes through memory, forward and backward in bf16: of a token, for every value of its state and
# each part of a kept layer; for every logit; for every parameter in the optimizer's step; and when
# a micro-batch's gradients are added up.
PART_BYTES, COMPILED_PART_BYTES = 320.0, 66.0
LOGIT_BYTES = 228
PARAMETER_BYTES, ADDED_BYTES = 52, 10
# Of the compute that backward is: what gradients may be reduced beside. And of communication that
# compute may hide, what is seen all the same: an assumption, which nobody has measured here.
BACKWARD = 2 / 3
UNHIDDEN = 0.5


@dataclass(frozen=True)
class Job:
    """A run on GPUs of a kind: `parallel.processes` of them, or one replica's.

    Attributes:
        pieces: parameters of the model's pieces.
        cuts: ends of the layer ranges of the pipe stages.
        size: of a micro-batch.
    """

    gpu: Gpu
    config: RunConfig
    method: Method
    pieces: Sequence[PieceSize]
    cuts: Sequence[int]
    size: StepSize

    def __post_init__(self) -> None:
        """Raises UserError where nothing is known to go by."""
        if self.method.shape.has_state_space:
            raise UserError(
                f"--gpu={self.gpu.name}: the time of a {self.method.shape.family} is not "
                f"estimated: its scan is no matrix product; measure it on such a GPU (--measure)."
            )
        if self.config.parallel.offload:
            raise UserError(
                f"--gpu={self.gpu.name}: the time of parallel.offload=True is not estimated: the "
                f"host steps; measure it on such a node (--measure), or set "
                f"parallel.offload=false."
            )

    @property
    def processes(self) -> int:
        return self.config.parallel.processes or self.config.parallel.pipe

    @property
    def replicas(self) -> int:
        return self.config.data_parallel(self.processes)

    @property
    def accumulation(self) -> int:
        return self.config.batch.accumulation(self.replicas)

    @property
    def value_bytes(self) -> int:
        return 2 if self.config.precision == "bf16" else 4

    @property
    def peak(self) -> float:
        """Of one GPU, FLOP/s."""
        return self.gpu.peak_flops(self.config.precision)


@dataclass(frozen=True)
class StepSeconds:
    """Where the time of a step goes, on average over the pipe stages.

    Attributes:
        compute_s: micro-batches.
        waiting_s: pipe stages for each other: the bubble, and stages of unequal work.
        links_s: communication that nothing hides.
        optimizer_s: the optimizer's step.
    """

    compute_s: float
    waiting_s: float
    links_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.waiting_s + self.links_s + self.optimizer_s


def step_seconds(job: Job, phase: int | None) -> StepSeconds:
    """The mean step of a phase; of the full model where `phase` is None."""
    loads, config, sent, added = _loads(job, phase), job.config, 1.0, 1.0
    if phase is not None:
        plans = config.batch.micro_batches if job.method.by_micro_batch else 1
        sent = reduced_share(config, job.method, phase, plans)
        added = _share(config, job.method, phase, plans, by_unit=False)
    stages = _pipe_stage_seconds(job, loads, added)
    number, count = job.accumulation, len(stages)
    sending = _sending_s(job) if count > 1 else 0.0
    # One forward, one backward: the first micro-batch goes through all stages, the others come out
    # at the pace of the slowest (GPipe, arXiv 1811.06965, section 2.3, for equal stages).
    passed = sum(stages) + count * sending + (number - 1) * (max(stages) + sending)
    compute = number * sum(stages) / count
    links = max(_reduced_s(job, stage, sent, loads) for stage in _stages(job))
    links = _exposed(job, links, compute, loads)
    largest = max(sum(stage) for stage in _stages(job))
    sharded = job.replicas if config.parallel.zero else 1
    return StepSeconds(
        compute_s=compute,
        waiting_s=passed - compute - number * sending,
        links_s=links + number * sending,
        optimizer_s=PARAMETER_BYTES * largest / sharded / job.gpu.memory_bytes_s,
    )


def phase_flops(job: Job, phase: int | None) -> float:
    """`model` FLOPs of a mean step of a phase, of all GPUs."""
    one = step_flops(job.method.shape, _loads(job, phase), **vars(job.size)).model
    return one * job.accumulation * job.replicas


def _loads(job: Job, phase: int | None) -> Sequence[Load]:
    return full_loads(job.method.shape) if phase is None else _mean_loads(job.method, phase)


# Asked for many layouts of one run.
@lru_cache(maxsize=256)
def _mean_loads(method: Method, phase: int) -> Sequence[Load]:
    return method.computed(method.mean_loads(phase))


@lru_cache(maxsize=256)
def _gradient_share(method: Method, phase: int, micro_batches: int, by_unit: bool) -> float:
    return gradient_share(method, phase, micro_batches, by_unit)


def _pipe_stage_seconds(job: Job, loads: Sequence[Load], added: float) -> list[float]:
    """Seconds of a micro-batch on every pipe stage, forward and backward.

    Args:
        added: share of the layers' gradients that are added up.
    """
    shape, size = job.method.shape, job.size
    flops, head_flops = flops_by_layer(shape, loads, size)
    part_bytes = COMPILED_PART_BYTES if job.config.compile else PART_BYTES
    part_bytes *= job.value_bytes / 2
    again = 4 / 3 if job.config.activation_checkpointing else 1.0
    decoded, layers = (size.target if shape.encoder_layers else size.source)[0], []
    for i, (parts, load) in enumerate(zip(shape.layers, loads)):
        tokens = decoded if i >= shape.encoder_layers else size.source[0]
        states = tokens * load.positions * load.probability * shape.hidden * len(parts)
        moved_s = part_bytes * states / job.gpu.memory_bytes_s
        layers.append(again * (_products_s(job, flops[i].model) + moved_s))
    logits_s = LOGIT_BYTES * decoded * shape.vocabulary / job.gpu.memory_bytes_s
    head = _products_s(job, head_flops) + logits_s
    stages = [sum(layers[a:b]) for a, b in zip([0, *job.cuts], job.cuts)]
    stages[-1] += head
    sums = [ADDED_BYTES * (added * inner + others) for inner, others in _stages(job)]
    return [own_s + moved / job.gpu.memory_bytes_s for own_s, moved in zip(stages, sums)]


def _products_s(job: Job, flops: float) -> float:
    return flops / (PEAK_SHARE * job.peak)


def _stages(job: Job) -> list[tuple[int, int]]:
    """Parameters of the layers of every pipe stage, and the others that it holds."""
    found = []
    for stage in pipe_stage_pieces(job.pieces, job.cuts):
        layers = layer_parameters(stage)
        found.append((layers, total_parameters(stage) - layers))
    return found


def reduced_share(config: RunConfig, method: Method, phase: int, plans: int) -> float:
    """Share of the layers' gradients that replicas send each other in a step of a phase.

    Args:
        plans: that micro-batches draw apart; 1: they share one.
    """
    return _share(config, method, phase, plans, by_unit=reduces_flat(config))


def _share(config: RunConfig, method: Method, phase: int, plans: int, by_unit: bool) -> float:
    """Share of the layers' gradients that are added up; `by_unit` is that of `gradient_share`."""
    zero = config.parallel.zero
    if zero == 0 or (zero == 3 and plans > 1):
        return 1.0
    return _gradient_share(method, phase, plans, by_unit)


def _reduced_s(job: Job, parameters: tuple[int, int], sent: float, loads: Sequence[Load]) -> float:
    """Seconds of a step in which replicas exchange gradients and weights of a stage.

    Rings (arXiv 1910.02054, section 7): n replicas pass (n - 1) / n of the bytes on to reduce and
    scatter, or to gather, and twice that to reduce for all. ZeRO 0, 1 and 2 reduce for all, as
    DeepSpeed does with buckets of several owners, 2 after every micro-batch; 1 and 2 then gather
    the weights. ZeRO 3 gathers kept layers for forward and backward, and reduces, every time.
    """
    replicas, zero = job.replicas, job.config.parallel.zero
    layers, others = parameters
    width = 2 if "16" in job.config.deepspeed.get("communication_data_type", "") else 4
    gradients = width * (others + sent * layers)
    weights = job.value_bytes * (layers + others)
    if zero == 3:
        kept = sum(load.probability for load in loads) / len(loads)
        gathers = 3 if job.config.activation_checkpointing else 2
        gathered = gathers * job.value_bytes * (others + kept * layers)
        moved = job.accumulation * (gathered + gradients)
    else:
        moved = 2 * gradients * (job.accumulation if zero == 2 else 1) + weights * (zero > 0)
    return (replicas - 1) / replicas * moved / _rate(job, replicas)


def _exposed(job: Job, links_s: float, compute_s: float, loads: Sequence[Load]) -> float:
    """What is left of communication beside the compute that hides it: ZeRO 3 fetches ahead; 1 and 2
    reduce beside the backward where `overlap_comm` says so.

    ZeRO 3 fetches ahead by the order of the last micro-batches, which a plan that skips other
    layers changes: two of its micro-batches then wait for every layer.
    """
    zero = job.config.parallel.zero
    overlaps = job.config.deepspeed.get("zero_optimization", {}).get("overlap_comm", zero == 3)
    if not overlaps:
        return links_s
    changes = zero == 3 and any(0.0 < load.probability < 1.0 for load in loads)
    waiting = min(1.0, 2 / job.accumulation) if changes else 0.0
    hiding_s = compute_s * (1.0 if zero == 3 else BACKWARD)
    rest_s = max(links_s - hiding_s, UNHIDDEN * links_s)
    return waiting * links_s + (1.0 - waiting) * rest_s


def _sending_s(job: Job) -> float:
    """Seconds in which a pipe stage hands on a micro-batch's states, and takes their gradient."""
    shape, streams = job.method.shape, 2 if job.method.shape.encoder_layers else 1
    tokens = max(job.size.source[0], job.size.target[0])
    return 2 * streams * tokens * shape.hidden * job.value_bytes / _rate(job, job.processes)


def _rate(job: Job, neighbours: int) -> float:
    """Bytes/s between so many neighbouring ranks: replicas of a stage are neighbours, the stages
    of a replica are not."""
    gpu = job.gpu
    within = neighbours <= gpu.per_node and (
        job.processes <= gpu.per_node or gpu.per_node % neighbours == 0
    )
    return LINK_SHARE * (gpu.link_bytes_s if within else gpu.network_bytes_s)


@dataclass(frozen=True)
class PublishedMfu:
    """Model FLOPs utilisation that a training reached, in bf16 at sequences of 2,048 or 1,024.

    Attributes:
        device: as `peaks.PEAKS` has it.
        parameters: of the model.
    """

    device: str
    parameters: float
    mfu: float
    model: str
    source: str


_MPT = "mosaicml/llm-foundry, scripts/train/benchmarking"
_HERE = "tests/benchmarks"
PUBLISHED = (
    PublishedMfu("H200", 1.1e9, 0.450, "TinyLlama, compiled, this engine", _HERE),
    PublishedMfu("H200", 1.1e9, 0.341, "TinyLlama, this engine", _HERE),
    PublishedMfu("H200", 0.124e9, 0.189, "GPT-2, compiled, this engine", _HERE),
    PublishedMfu("H100", 0.76e9, 0.349, "MPT-760M", _MPT),
    PublishedMfu("H100", 1.32e9, 0.418, "MPT-1B", _MPT),
    PublishedMfu("H100", 2.65e9, 0.437, "MPT-3B", _MPT),
    PublishedMfu("H100", 6.66e9, 0.464, "MPT-7B", _MPT),
    PublishedMfu("H100", 12.9e9, 0.398, "MPT-13B", _MPT),
    PublishedMfu("H100", 30.0e9, 0.381, "MPT-30B", _MPT),
    PublishedMfu("A100", 0.125e9, 0.448, "MPT-125M", _MPT),
    PublishedMfu("A100", 0.356e9, 0.516, "MPT-350M", _MPT),
    PublishedMfu("A100", 0.76e9, 0.569, "MPT-760M", _MPT),
    PublishedMfu("A100", 1.1e9, 0.56, "TinyLlama", "jzhang38/TinyLlama, README"),
    PublishedMfu("A100", 1.32e9, 0.599, "MPT-1B", _MPT),
    PublishedMfu("A100", 2.65e9, 0.621, "MPT-3B", _MPT),
    PublishedMfu("A100", 6.66e9, 0.642, "MPT-7B", _MPT),
    PublishedMfu("A100", 12.9e9, 0.596, "MPT-13B", _MPT),
    PublishedMfu("A100", 30.0e9, 0.553, "MPT-30B", _MPT),
)


def nearest_published(gpu: Gpu, parameters: float) -> PublishedMfu | None:
    """What others reached on this GPU with a model of nearly this size; None: twice as large or
    more is not near."""

    def distance(row: PublishedMfu) -> float:
        return abs(math.log2(parameters / row.parameters))

    near = [row for row in PUBLISHED if row.device == gpu.device and distance(row) < 1]
    return min(near, key=distance, default=None)


@dataclass(frozen=True)
class PhaseTime:
    """The steps of a phase.

    Attributes:
        step_s: of a mean step.
        flops: `model` FLOPs of a mean step.
        parts: where its time goes; None where it was measured.
    """

    name: str
    num_steps: int
    step_s: float
    flops: float
    parts: StepSeconds | None = None


@dataclass(frozen=True)
class RunTime:
    """The time of a run's steps, and of as many of the full model.

    Attributes:
        device: what it runs on.
        processes: one on each device.
        phases: of the whole schedule; measured ones without those that are over before a branch
            begins.
        dense: the full model's, of the same number of steps.
        peak: of one device, FLOP/s; None where nobody has listed it.
    """

    device: str
    processes: int
    phases: tuple[PhaseTime, ...]
    dense: PhaseTime
    peak: float | None

    @property
    def total_s(self) -> float:
        return sum(phase.num_steps * phase.step_s for phase in self.phases)

    @property
    def dense_s(self) -> float:
        return self.dense.num_steps * self.dense.step_s

    @property
    def saved(self) -> float:
        """Share of the dense run's time that is saved."""
        return 1.0 - self.total_s / self.dense_s

    def mfu(self, phase: PhaseTime) -> float | None:
        """Model FLOPs utilisation of a phase's steps, by the FLOPs that they compute."""
        if self.peak is None:
            return None
        return mfu(phase.flops, phase.step_s, self.processes * self.peak)


def estimated(job: Job) -> RunTime:
    """The time of a run by peak rates, memory and links; of the whole schedule, from step 0."""
    phases = []
    for i, phase in enumerate(job.method.phases):
        parts = step_seconds(job, i)
        steps = phase.until_step - phase.from_step
        phases.append(PhaseTime(phase.name, steps, parts.total_s, phase_flops(job, i), parts))
    parts = step_seconds(job, None)
    dense = PhaseTime("dense", job.method.steps, parts.total_s, phase_flops(job, None), parts)
    return RunTime(job.gpu.name, job.processes, tuple(phases), dense, job.peak)
