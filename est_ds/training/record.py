"""What people and programs see of a training: lines, `metrics.jsonl`, trackers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from statistics import mean
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from est_ds.cost.flops import dense_flops, step_flops
from est_ds.cost.peaks import mfu, peak_flops
from est_ds.cost.pipe_cuts import bubble, imbalance, pipe_stage_costs
from est_ds.engine.base import Engine
from est_ds.errors import amount
from est_ds.plans.methods.base import SAVES_NOTHING, plan_loads
from est_ds.plans.phases import Phase
from est_ds.plans.plan import StepPlans
from est_ds.ranks.world import World, say
from est_ds.run.metrics import (
    MetricsFile,
    depth_text,
    nats,
    phase_note,
    read_lines,
    read_phase,
    use_texts,
)
from est_ds.run.prepare import Run
from est_ds.run.step_times import FILE, StepTimes
from est_ds.run.trackers import Trackers, point_of
from est_ds.run.windows import write_windows
from est_ds.training.boundaries import Side
from est_ds.training.clock import Times
from est_ds.training.evaluate import HeldOut
from est_ds.training.progress import Progress, clock

if TYPE_CHECKING:
    from est_ds.engine.pipe_clock import PipeShares

MEASURED = 64  # steps of a phase in which the update is measured


@dataclass(frozen=True)
class Trained:
    """A step that was applied.

    Attributes:
        loss: nats per token, the mean of all replicas.
        rate: learning rate.
        grad_norm: of all parameters, before clipping.
        took: its times.
        spike: what the loss was, if it was a spike.
        moved: root mean square of what the step added to the weights of the layers, decay
            included (`engine.moved`); None where it was not measured.
    """

    plans: StepPlans
    loss: float
    rate: float
    grad_norm: float
    took: Times
    spike: str | None = None
    moved: float | None = None


def measured_layers(run: Run, step: int) -> Collection[int]:
    """Layers by whose weights the update of a step is measured: all that there are at that step, in
    up to `MEASURED` logged steps of every phase; none in the others."""
    if step not in _measured_steps(run.method.phase_of(step), run.config.log.every):
        return ()
    whole = run.method.whole(step)
    return range(run.method.shape.num_layers) if whole is None else whole.kept_layers


@cache
def _measured_steps(phase: Phase, every: int) -> frozenset[int]:
    """Logged steps that lie evenly over a phase, the first and the last one among them."""
    first = -(-(phase.from_step + 1) // every) * every - 1
    logged = sorted({*range(first, phase.until_step, every), phase.until_step - 1})
    chosen = np.linspace(0, len(logged) - 1, min(MEASURED, len(logged)))
    return frozenset(logged[i] for i in chosen.astype(int))


class Recorder:
    """Shows and logs a training; does nothing off rank 0, where every rank calls it alike.

    To be used in a `with`.

    Args:
        start: first step that this process trains.
    """

    def __init__(self, run: Run, engine: Engine, start: int) -> None:
        self._run, self._engine = run, engine
        is_first = World.from_environment().is_first
        self._progress = Progress(run.config.steps, start, _remaining(run, start), is_first)
        self._metrics = self._trackers = None
        if is_first:
            self._metrics = MetricsFile(run.directory, start, layout_of(run, engine))
            lines = partial(read_lines, run.directory)
            self._trackers = Trackers(run.config, run.method, start, lines, self.note)
        self._start = start
        self._peak = _peak_of(run, engine)
        self._used: dict[str, float] = {}

    def __enter__(self) -> Recorder:
        for line in _start_lines(self._run, self._engine, self._start):
            say(line)
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        if self._trackers:
            self._trackers.close(ended_well=kind is None)
        if self._metrics and kind is None:  # else it might raise what has been raised
            self._metrics.close()

    def note(self, text: str) -> None:
        """Shows a line."""
        self._progress.note(text)

    def sync(self) -> None:
        """Waits until all lines of metrics are on disk."""
        if self._metrics:
            self._metrics.sync()

    def trained(self, step: Trained, shares: PipeShares | None) -> None:
        """Shows a step, and logs it where `log.every` says so, at a phase's end, or as a spike.

        Args:
            shares: of the pipe stages in the phase that ends with this step.
        """
        run, number = self._run, step.plans.step
        done, phase = number + 1, run.method.phase_of(number)
        self._progress.step(number, self._shown(step, phase))
        is_end = done == phase.until_step
        if done % run.config.log.every and not is_end and not step.spike:
            return
        entry = _entry(run, step)
        entry |= self._use(entry)
        if step.spike:
            entry["spike"] = step.spike
            self.note(f"step {number}: {step.spike}")
        if shares:
            entry |= {"pipe_imbalance": shares.imbalance, "pipe_waiting": shares.waiting}
            self.note(_pipe_note(run, self._engine, shares, run.method.phase_at(number)))
        if self._metrics:
            self._metrics.write_step(**entry)
            if is_end and (text := phase_note(read_phase(run.directory, phase))):
                self.note(f"phase {phase.name}: {text}")
        self._track(entry)

    def _use(self, entry: dict[str, Any]) -> dict[str, float]:
        """How the GPUs were used, by a line of a step; nothing on CPUs."""
        used: dict[str, float] = {}
        if self._peak:
            for name, flops in (("mfu", "flops_active"), ("mfu_dense", "flops_dense")):
                used[name] = mfu(entry[flops], entry["step_s"], self._peak)
        memory = self._engine.memory_peak_bytes()
        if memory is not None:
            used["memory_peak_bytes"] = memory
        self._used = used
        return used

    def _shown(self, step: Trained, phase: Phase) -> str:
        """A step in words, with how the GPUs were used when a line was last logged."""
        tokens, took = self._run.config.tokens_after(step.plans.step + 1), step.took
        spent = "" if took.trained_s is None else f" in {clock(took.trained_s)}"
        return "  ".join(
            [
                f"phase {phase.name}",
                f"loss {step.loss:.4f}",
                f"{self._run.tokens_per_step / took.step_s:,.0f} tokens/s",
                *use_texts(self._used),
                f"{amount(tokens)} tokens{spent}",
            ]
        )

    def left_out(self, step: int, reason: str) -> None:
        """Shows and logs that a step was not trained."""
        self.note(f"step {step} is left out: {reason}")
        self._write({"step": step, "skipped": reason})

    def evaluated(self, step: int, found: HeldOut) -> float:
        """Shows and logs held-out losses after a step; returns their mean."""
        run, losses, mean = self._run, found.losses, found.mean
        if self._metrics and found.windows:
            write_windows(run.directory, step + 1, found.windows)
        bits = {name: run.valid[name].bits_per_byte(loss) for name, loss in losses.items()}
        mean_bits = None if None in bits.values() else sum(bits.values()) / len(bits)
        by_name = {} if isinstance(run.config.data.valid, str) else losses
        entry = {"step": step, "eval_loss": mean, "eval_layers": run.method.depth(step)}
        if by_name:
            entry["eval_losses"] = by_name
        if mean_bits is not None:
            entry["eval_bits_per_byte"] = mean_bits
        self._write(entry)
        each = "".join(f", {name} {nats(loss, bits[name])}" for name, loss in by_name.items())
        model = depth_text(entry["eval_layers"], run.method.shape.num_layers)
        self.note(f"step {step + 1}: held-out loss of {model} {nats(mean, mean_bits)}{each}")
        return mean

    def at_boundary(self, step: int, before: Side, after: Side) -> None:
        """Shows and logs held-out losses on both sides of a boundary, before `step` is trained."""
        shown = []
        for part in (before, after):
            self._write({"step": step, **part.entry})
            shown.append(f"{part.full:.4f}, subnetworks of {part.phase} {part.subnetwork:.4f}")
        self.note(f"held-out loss before step {step + 1}: full model {'; '.join(shown)}")

    def measured(self, times: StepTimes) -> None:
        """Saves what was measured in turns at the end."""
        times.write(self._run.directory / FILE)
        self.note(
            f"step times measured in turns, {times.num_rounds} rounds; other processes used "
            f"{times.others:.2g} of {times.processors} processors"
        )

    def went_back(self, step: int) -> None:
        """Says that training goes on from an earlier step, and drops the lines from there on."""
        self.note(f"at step {step}, the last checkpoint")
        if self._metrics:
            self._metrics.go_back(step)
        if self._trackers:
            self._trackers.go_back(step)

    def _write(self, entry: dict[str, Any]) -> None:
        if self._metrics:
            self._metrics.write(**entry)
        self._track(entry)

    def _track(self, entry: dict[str, Any]) -> None:
        """Has trackers, and DeepSpeed's monitors, show the figures of a line."""
        if self._trackers:
            self._trackers.send(entry)
        if self._engine.has_monitor and (point := point_of(entry, self._run.method)):
            self._engine.write_events(point.figures, point.done)


def _entry(run: Run, step: Trained) -> dict[str, Any]:
    """A training line of `metrics.jsonl`; what is kept and computed is the plans' mean."""
    shape, size = run.method.shape, run.flops_size(run.config.batch.global_)
    loads = [run.method.computed(plan_loads(plan, shape)) for plan in step.plans]
    active = [step_flops(shape, computed, **size) for computed in loads]
    dense = dense_flops(shape, **size)
    kept_layers = mean(len(plan.kept_layers) for plan in step.plans)
    number, clip = step.plans.step, run.config.optimizer.clip
    entry = {
        "step": number,
        "phase": run.method.phase_of(number).name,
        "loss": step.loss,
        "lr": step.rate,
        "grad_norm": step.grad_norm,
        "clipped": 0.0 < clip < step.grad_norm,
        "tokens": run.config.tokens_after(number + 1),
        "step_s": step.took.step_s,
        "step_cpu_s": step.took.cpu_s,
        "tokens_per_s": run.tokens_per_step / step.took.step_s,
        "flops_active": mean(flops.model for flops in active),
        "flops_dense": dense.model,
        "blocks_active": mean(flops.blocks for flops in active),
        "blocks_dense": dense.blocks,
        "kept_layers": kept_layers,
        "plan_digest": step.plans.digest,
        "data_digest": run.train.digest(number),
    }
    if step.took.trained_s is not None:
        entry["trained_s"] = step.took.trained_s
    if step.moved is not None and step.rate:
        entry["update_rms"] = step.moved / step.rate
    return entry


def _pipe_note(run: Run, engine: Engine, shares: PipeShares, phase: int) -> str:
    """How evenly the pipe stages shared a phase's work, beside what FLOPs and schedule say."""
    config = run.config
    expected = imbalance(pipe_stage_costs(run.method, phase, run.cuts, **run.flops_size(1)))
    waits = bubble(config.parallel.pipe, config.batch.accumulation(engine.num_replicas))
    return (
        f"phase {run.method.phases[phase].name}: pipe stages compute "
        f"{' '.join(f'{busy:.2f}' for busy in shares.busy)} of the time; "
        f"slowest over mean {shares.imbalance:.2f} (by FLOPs {expected:.2f}), "
        f"waiting {shares.waiting:.2f} (bubble alone {waits:.2f})"
    )


def _remaining(run: Run, start: int) -> Callable[[int], float]:
    """Maps a step to the share of the work from `start` on that is still to do after it."""
    size, method = run.flops_size(1), run.method
    work = [
        step_flops(method.shape, method.computed(method.mean_loads(phase)), **size).model
        for phase in range(len(method.phases))
    ]
    done = [0.0, *accumulate(work[method.phase_at(step)] for step in range(run.config.steps))]
    # A run that went back may be before `start`.
    return lambda step: 1.0 - max(0.0, done[step + 1] - done[start]) / (done[-1] - done[start])


def _start_lines(run: Run, engine: Engine, start: int) -> list[str]:
    config = run.config
    lines = [
        f"{'resuming at' if start else 'starting at'} step {start} of {config.steps}: "
        f"{run.processes} processes = {config.parallel.pipe} pipe stages x {engine.num_replicas} "
        f"replicas, ZeRO {config.parallel.zero}, {config.precision}",
        f"{config.batch.equation(engine.num_replicas)} sequences of {config.data.sequence} tokens",
    ]
    if engine.on_gpu and _peak_of(run, engine) is None:
        lines.append(f"no MFU: nobody has listed the peak rate of {device_name()} (cost/peaks.py)")
    if run.method.masked:
        lines.append(f"method.compute=masked: {SAVES_NOTHING}")
    return lines + _corpora(run)


def _corpora(run: Run) -> list[str]:
    """What the run reads of every corpus; shares where there are several."""
    parts, train = run.config.data.parts, run.train
    counts = train.mixture.counts(run.config.steps * train.global_batch)
    return [
        f"corpus {part.corpus}: "
        + (f"{count / counts.sum():.2%} of the run's sequences, " if len(parts) > 1 else "")
        + f"{count / windows.num_samples:.3g} epochs"
        for part, count, windows in zip(parts, counts, train.corpora)
    ]


def _peak_of(run: Run, engine: Engine) -> float | None:
    """Peak rate of all GPUs of a run together, FLOP/s; None on CPUs, and of unknown GPUs."""
    if not engine.on_gpu:
        return None
    one = peak_flops(device_name(), run.config.precision)
    return None if one is None else one * run.processes


def device_name() -> str:
    """The GPU's, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def layout_of(run: Run, engine: Engine) -> dict[str, Any]:
    """What the times of this start's steps depend on besides their plans."""
    config = run.config
    set_too = {
        "cuts": run.cuts if config.parallel.pipe > 1 else None,
        "offload": config.parallel.offload,
        "activation_checkpointing": config.activation_checkpointing,
        "compile": config.compile,
    }
    always = {"micro": config.batch.micro, "device": device_name()}
    return engine.layout | always | {name: value for name, value in set_too.items() if value}
