"""The most that a process holds at a time: the moments of a step, and the largest. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from est_ds.config.run_config import RunConfig
from est_ds.cost.activations import Kept, Setting, activations
from est_ds.cost.flops import StepSize, kept_weights, part_weights
from est_ds.cost.states import (
    Process,
    States,
    before_backward,
    gathered,
    held,
    reduction,
    update,
    within_backward,
)
from est_ds.plans.methods.base import Load, Method
from est_ds.plans.methods.rates import KeepRates
from est_ds.plans.shape import Attention, Mlp, Part


@dataclass(frozen=True)
class Memory:
    """Bytes that one process of a pipe stage holds when it holds most.

    Attributes:
        moment: when that is.
        pipe_stage: of the process, one of `num_pipe_stages`.
        states: weights, gradients, optimizer, communication buckets, gathered parameters.
        activations: of all micro-batches that are under way.
        logits: of the last stage: logits, loss and their gradients.
        held_bytes: what stays from step to step.
    """

    moment: str
    pipe_stage: int
    states: States
    activations: float
    logits: float
    held_bytes: float = 0.0
    num_pipe_stages: int = 1

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by what they are of; they add up to `total_bytes`."""
        states = {k: v for k, v in vars(self.states).items() if k != "host"}
        return {**states, "activations": self.activations, "logits": self.logits}

    @property
    def total_bytes(self) -> float:
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> float:
        return self.states.host


@dataclass(frozen=True)
class Subject:
    """What is estimated.

    Attributes:
        cuts: ends of the layer ranges of the pipe stages.
        pipe_stage_parameters: parameters of every pipe stage.
        sequence: tokens of a sample, and of its target (None: no encoder-decoder).
        setting: how the layers compute.
    """

    config: RunConfig
    method: Method
    cuts: Sequence[int]
    pipe_stage_parameters: Sequence[int]
    sequence: tuple[int, int | None]
    setting: Setting

    @property
    def size(self) -> StepSize:
        """Of a micro-batch."""
        (sequence, target), micro = self.sequence, self.config.batch.micro
        return StepSize(
            tokens=micro * sequence,
            sequence=sequence,
            target_tokens=None if target is None else micro * target,
            target_sequence=target,
        )


def memory_of_phase(subject: Subject, phase: int, data_parallel: int) -> Memory:
    """The most that any process holds in the steps of a phase."""
    stages = range(len(subject.cuts))
    found = (memory_of_pipe_stage(subject, phase, data_parallel, stage) for stage in stages)
    return max(found, key=lambda memory: memory.total_bytes)


def memory_of_run(subject: Subject, data_parallel: int) -> Memory:
    """The most that any process holds in any phase."""
    phases = range(len(subject.method.phases))
    found = (memory_of_phase(subject, phase, data_parallel) for phase in phases)
    return max(found, key=lambda memory: memory.total_bytes)


def memory_of_pipe_stage(subject: Subject, phase: int, data_parallel: int, stage: int) -> Memory:
    """The most that a process of a pipe stage holds in the steps of a phase."""
    first, end = [0, *subject.cuts][stage], subject.cuts[stage]
    loads = most_loads(subject.method, phase, (first, end))
    kept = activations(subject.method.shape, loads, subject.size, subject.setting)
    process = _process(subject, loads, data_parallel, stage)
    count = subject.config.batch.accumulation(data_parallel)
    under_way = min(len(subject.cuts) - stage, count)
    settings = {(under_way, count > under_way)}
    if under_way > 1:
        settings.add((under_way - 1, True))
    is_last = end == subject.cuts[-1]
    one = _PipeStage(subject, process, kept, (first, end), is_last, min(count, max(2, under_way)))
    moments = [
        Memory("reduction", 0, reduction(process, count > 1), 0.0, 0.0),
        Memory("optimizer step", 0, update(process), 0.0, 0.0),
    ]
    for at_once, accumulated in settings:
        moments += _passes(one, at_once, accumulated)
    between, (activated, logits) = held(process), one.passed_on
    stays = Memory("between steps", stage, between, activated, logits)
    full = (
        replace(
            m,
            pipe_stage=stage,
            states=m.states + between,
            activations=m.activations + activated,
            logits=m.logits + logits,
            held_bytes=stays.total_bytes,
            num_pipe_stages=len(subject.cuts),
        )
        for m in moments
    )
    return max(full, key=lambda memory: memory.total_bytes)


def most_loads(method: Method, phase: int, layers: tuple[int, int]) -> tuple[Load, ...]:
    """What a stage computes at most: what is kept where counts are exact and spread over bands, at
    the phase's first or last step; without bands one stage may have all that are kept, and where
    chances are drawn apart all layers."""
    within = method.phases[phase]
    ends = [method.computed(method.loads(s)) for s in (within.from_step, within.until_step - 1)]
    loads = max(ends, key=lambda loads: sum(x.probability * x.positions for x in loads))
    first, end = layers
    chances = [load.probability for load in loads]
    if isinstance(method, KeepRates):
        return tuple(replace(load, probability=1.0) for load in loads)
    own, kept = sum(chances[first:end]), sum(chances)
    if method.band_lengths is not None or not own or method.masked:
        return loads
    factor = min(end - first, kept) / own
    return tuple(replace(x, probability=min(1.0, factor * x.probability)) for x in loads)


@dataclass(frozen=True)
class _PipeStage:
    """A pipe stage in a phase.

    Attributes:
        layers: its range of layers.
        is_last: it has the head.
        buffers: micro-batches whose input and output DeepSpeed's pipeline holds.
    """

    subject: Subject
    process: Process
    kept: Kept
    layers: tuple[int, int]
    is_last: bool
    buffers: int

    @property
    def passed_on(self) -> tuple[float, float]:
        """Bytes of activations and of logits that the pipeline's buffers hold, between steps too:
        what came in, the gradient of what went out, and the last stage's outputs."""
        if len(self.subject.cuts) == 1:
            return 0.0, 0.0
        first, end = self.layers
        one = max(self.kept.inputs[first:end], default=0.0)
        outputs = self.buffers * self.kept.loss.output if self.is_last else 0.0
        return one * (1 + self.buffers * (first > 0)), outputs


def _passes(stage: _PipeStage, at_once: int, accumulated: bool) -> Iterator[Memory]:
    """The moments of a micro-batch's backward: before it, in the head, and in every layer.

    Args:
        at_once: micro-batches that are under way.
        accumulated: there are gradients of others.
    """
    kept, process, (first, end) = stage.kept, stage.process, stage.layers
    shape, config = stage.subject.method.shape, stage.subject.config
    layers = (kept.inputs if config.activation_checkpointing else kept.layers)[first:end]
    behind = kept.ends[1] if stage.is_last else 0.0
    left = sum(layers) + (kept.ends[0] if first == 0 else 0.0)
    others = (at_once - 1) * (left + behind)
    found, whole = before_backward(process, accumulated), gathered(process, False)

    def moment(name: str, added: States, activations: float, logits: float = 0.0) -> Memory:
        return Memory(name, 0, found + added, others + activations, logits)

    yield moment("end of the forward", gathered(process, True), left + behind)
    done = 0.0
    if stage.is_last:
        done = shape.hidden * shape.vocabulary
        yield moment("loss", whole, left + behind, kept.loss.most)
        head = States(gradients=process.width * done) + whole
        yield moment("backward of the head", head, left + behind, kept.loss.backward)
    for i in reversed(range(first, end)):
        again = kept.whole[i] if config.activation_checkpointing and kept.layers[i] else 0.0
        name = f"backward of layer {i}"
        added = within_backward(process, accumulated, done) + whole
        yield moment(name, added, left + again + kept.working[i])
        # A bucket is reduced where a gradient has come, and what gave it is gone.
        added = within_backward(process, accumulated, done, reducing=True) + whole
        yield moment(name, added, left + again)
        left -= layers[i - first]
        done += sum(map(part_weights, shape.layers[i])) * (kept.layers[i] > 0)


def _process(subject: Subject, loads: Sequence[Load], data_parallel: int, stage: int) -> Process:
    """The process of a stage, with the sizes of its matrices. Plans that micro-batches draw apart
    train together what any of them keeps."""
    shape, cuts = subject.method.shape, subject.cuts
    first, end = [0, *cuts][stage], cuts[stage]
    draws = subject.config.batch.micro_batches if subject.method.by_micro_batch else 1
    tensors: list[int] = []
    skipped = narrowed = 0.0
    for parts, load in zip(shape.layers[first:end], loads[first:end]):
        skipped += (1 - load.probability) ** draws * sum(map(part_weights, parts))
        for part, units, groups in zip(parts, load.units, load.key_value_groups, strict=True):
            tensors += _matrices(part)
            left_out = part_weights(part) - kept_weights(part, units, groups)
            narrowed += load.probability * left_out * (not subject.method.by_micro_batch)
    ends = (stage == 0) + (end == cuts[-1])
    parameters = subject.pipe_stage_parameters[stage]
    table = shape.hidden * shape.vocabulary
    room = (parameters - sum(tensors)) // table
    tensors += [table] * min(ends, room)
    return Process(
        subject.config,
        parameters,
        tuple(tensors),
        data_parallel,
        parameters - skipped,
        parameters - skipped - narrowed,
        subject.setting.on_gpu,
    )


def _matrices(part: Part) -> list[int]:
    """Sizes of the matrices of a part."""
    if isinstance(part, Attention):
        one = part.hidden * part.head_dim
        return [one * part.heads] * 2 + [one * part.key_value_groups] * 2
    if isinstance(part, Mlp):
        return [part.hidden * part.columns] * part.matrices
    return [part_weights(part)]
