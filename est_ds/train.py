"""The training loop, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from est_ds.agreement import check_agreement, check_hashes
from est_ds.checkpoints.index import read_index
from est_ds.checkpoints.store import Store
from est_ds.data.prefetch import Prefetched
from est_ds.divergence import History
from est_ds.engine.base import Engine
from est_ds.engine.build import build_engine
from est_ds.engine.checkpoint import Saver, choose_checkpoint, load_checkpoint
from est_ds.engine.layout import bubble, imbalance, stage_costs
from est_ds.engine.setup import start_processes
from est_ds.errors import Failure, UserError
from est_ds.flops import Flops, dense_flops, step_flops
from est_ds.lr import learning_rate
from est_ds.metrics import MetricsFile
from est_ds.plans.methods.base import plan_loads
from est_ds.plans.plan import Plan
from est_ds.preempt import Preempted, noticed
from est_ds.progress import Progress, depth_text, nats
from est_ds.run import Run, data_shares
from est_ds.run_dir import lock_run_dir, write_config
from est_ds.run_state import check_state, run_state
from est_ds.runtime import World, say
from est_ds.watchdog import Watchdog

if TYPE_CHECKING:
    from est_ds.engine.pipe_clock import PipeShares

# Micro-batches a pipe stage between two looks for a notice.
EVALUATE_AT_ONCE = 8


def train(run: Run, world: World) -> None:
    """Trains a run from its latest checkpoint (or from the start) to its last step.

    Raises:
        UserError: the checkpoint does not fit the run, or a corpus was altered.
        Failure: ranks disagree, or a checkpoint cannot be written.
        Diverged: a loss or a gradient is no number, and `divergence` does not let it go on.
    """
    config = run.config
    lock = lock_run_dir(config) if world.is_first else None
    meeting = start_processes(world, config.watchdog.limit_s)
    with Watchdog(meeting, world, config.watchdog.limit_s) as watchdog:
        if config.data.verify == "hashes":
            check_hashes(run, world.local_rank == 0, lambda: watchdog.mark(0, "verifying data"))
        _train(run, world, watchdog)
    if lock:
        lock.close()


def _train(run: Run, world: World, watchdog: Watchdog) -> None:
    config, method, directory = run.config, run.method, run.directory
    store = Store(directory / "checkpoints")
    resumed = choose_checkpoint(store, config.resume)
    start = resumed or 0
    state = {} if resumed is None else read_index(store.path(start)).state
    if state:
        check_state(run, state)
    if world.is_first:
        write_config(config)
    engine = build_engine(
        config,
        run.hf_config,
        run.family,
        method,
        run.cuts,
        world,
        str(directory / "tensorboard"),
    )
    if resumed is not None:
        load_checkpoint(engine, store.path(start))
    engine.forget_events(start)
    metrics = MetricsFile(directory, start, _layout(run, engine)) if world.is_first else None
    _say_start(run, engine, start)
    check_agreement(run, start)

    work = _work_by_phase(run)
    ends = {phase.until_step for phase in method.phases}
    boundaries = ends | {share.from_step for share in data_shares(config)}
    history = History(config.divergence, boundaries, state.get("divergence"))
    progress = Progress(config.steps, start, _remaining(run, start, work), world.is_first)
    share = {"rank": engine.replica, "world": engine.num_replicas, "micro": config.batch.micro}
    loader = Prefetched(run.train, config.steps, **share)
    with progress, loader, Saver(engine, store) as saver:
        saver.check_space()
        if state.get("evaluation_due"):  # a notice cut it short
            losses = evaluate(run, engine, start - 1)
            _report_evaluation(run, engine, metrics, progress, start - 1, losses)
        if config.divergence.rolls_back and resumed is None:
            saver.save(0, run_state(run, 0, history), None)
        step = start
        while step < config.steps:
            watchdog.mark(step, "training")
            done = step + 1
            if growth := method.growth(step):
                # A checkpoint before it has just been written, or loaded: a crash loses nothing.
                engine.grow(growth)
            plan = method.plan(step)
            rate = learning_rate(config.schedule, config.optimizer.lr, step, config.steps)
            if history.begin(step):
                began = time.perf_counter()
                engine.set_learning_rate(rate)
                with engine.subnetwork.active(plan):
                    loss = engine.train_batch(loader.micro_batches(step))
                step_s = time.perf_counter() - began
                if history.judge(step, loss, engine.grad_norm) == "roll back":
                    saver.finish()
                    watchdog.mark(step, "going back")
                    progress.note(f"step {step}: {history.skipped[step]}; going back")
                    step = _go_back(engine, store, history, step)
                    progress.note(f"at step {step}, the last checkpoint")
                    if metrics:
                        metrics.go_back(step)
                    continue
            if reason := history.skipped.get(step):
                engine.set_steps_done(done)
                if done in ends:
                    engine.pipe_shares()  # of this phase: not to be counted in the next
                progress.note(f"step {step} is left out: {reason}")
                if metrics:
                    metrics.write(step=step, skipped=reason)
            else:
                trained = (step, plan, loss, rate, step_s, history.spike)
                _report_step(run, engine, metrics, progress, *trained)
            eval_loss, last, notice = None, done == config.steps, noticed()
            due = last or done % config.evaluate.every == 0
            if due and (last or not notice):
                watchdog.mark(done, "evaluating")
                losses = evaluate(run, engine, step, None if last else noticed)
                notice = losses is None
                if losses is not None:
                    eval_loss = _report_evaluation(run, engine, metrics, progress, step, losses)
            saver.poll()
            if done % config.checkpoint.every == 0 or done in ends or notice:
                watchdog.mark(done, "saving")
                if metrics:
                    metrics.sync()
                check_agreement(run, done)
                saver.save(done, run_state(run, done, history, due and eval_loss is None), eval_loss)
                notice = notice or noticed()
            if notice and not last:
                saver.finish()
                raise Preempted(done)
            step = done
    if metrics:
        metrics.close()


def _report_step(
    run: Run,
    engine: Engine,
    metrics: MetricsFile | None,
    progress: Progress,
    step: int,
    plan: Plan,
    loss: float,
    rate: float,
    step_s: float,
    spike: str | None,
) -> None:
    """Shows a step, and logs it where `log.every` says so, at the end of a phase, or as a spike."""
    done, phase = step + 1, run.method.phases[plan.phase]
    progress.step(step, phase.name, loss, run.tokens_per_step / step_s)
    is_end = done == phase.until_step
    if done % run.config.log.every and not is_end and not spike:
        return
    entry = _entry(run, engine, step, plan, loss, rate, step_s)
    if spike:
        entry["spike"] = spike
        progress.note(f"step {step}: {spike}")
    if is_end and (shares := engine.pipe_shares()):
        entry |= {"pipe_imbalance": shares.imbalance, "pipe_waiting": shares.waiting}
        progress.note(_pipe_note(run, engine, plan.phase, shares))
    if metrics:
        metrics.write_step(**entry)
    _to_monitor(engine, entry, done)


def _entry(
    run: Run, engine: Engine, step: int, plan: Plan, loss: float, rate: float, step_s: float
) -> dict[str, Any]:
    """A training line of `metrics.jsonl`."""
    active, dense = _flops(run, plan)
    return {
        "step": step,
        "phase": run.method.phases[plan.phase].name,
        "loss": loss,
        "lr": rate,
        "grad_norm": engine.grad_norm,
        "tokens": (step + 1) * run.tokens_per_step,
        "step_s": step_s,
        "tokens_per_s": run.tokens_per_step / step_s,
        "flops_active": active.model,
        "flops_dense": dense.model,
        "blocks_active": active.blocks,
        "blocks_dense": dense.blocks,
        "kept_layers": len(plan.kept_layers),
        "plan_digest": plan.digest,
        "data_digest": run.train.digest(step),
    }


def _pipe_note(run: Run, engine: Engine, phase: int, shares: PipeShares) -> str:
    """How evenly the pipe stages shared a phase's work, beside what FLOPs and schedule say."""
    config = run.config
    expected = imbalance(stage_costs(run.method, phase, run.cuts, **run.flops_size(1)))
    waits = bubble(config.parallel.pipe, config.batch.accumulation(engine.num_replicas))
    return (
        f"phase {run.method.phases[phase].name}: pipe stages compute "
        f"{' '.join(f'{busy:.2f}' for busy in shares.busy)} of the time; "
        f"slowest over mean {shares.imbalance:.2f} (by FLOPs {expected:.2f}), "
        f"waiting {shares.waiting:.2f} (bubble alone {waits:.2f})"
    )


def evaluate(
    run: Run, engine: Engine, step: int, interrupted: Callable[[], bool] | None = None
) -> dict[str, float] | None:
    """Mean held-out loss of the full model on each held-out corpus, nats per token; the same in
    every layout.

    A model that still grows is evaluated as deep as it is at `step` (`Method.depth`).

    Args:
        interrupted: asked by every rank from time to time; once it says so, the result is None.
    """
    config, losses = run.config, {}
    part = EVALUATE_AT_ONCE * config.parallel.pipe  # a pipeline fills and drains for each
    share = {"rank": engine.replica, "world": engine.num_replicas, "micro": config.batch.micro}
    whole = run.method.whole(step)
    for name, windows in run.valid.items():
        batches = list(windows.held_out(config.evaluate.sequences, **share))
        rows = len(batches) * config.batch.micro * engine.num_replicas
        losses[name] = 0.0
        for begin in range(0, len(batches), part):
            if interrupted and interrupted():
                return None
            some = batches[begin : begin + part]
            with engine.subnetwork.active(whole) if whole else nullcontext():
                losses[name] += engine.mean_loss(some) * len(some) / len(batches)
        losses[name] *= rows / config.evaluate.sequences
    return losses


def _report_evaluation(
    run: Run,
    engine: Engine,
    metrics: MetricsFile | None,
    progress: Progress,
    step: int,
    losses: dict[str, float],
) -> float:
    """Says and writes held-out losses; returns their mean."""
    mean = sum(losses.values()) / len(losses)
    bits = {name: run.valid[name].bits_per_byte(loss) for name, loss in losses.items()}
    mean_bits = None if None in bits.values() else sum(bits.values()) / len(bits)
    by_name = {} if isinstance(run.config.data.valid, str) else losses
    entry = {"eval_loss": mean, "eval_layers": run.method.depth(step)}
    if by_name:
        entry["eval_losses"] = by_name
    if mean_bits is not None:
        entry["eval_bits_per_byte"] = mean_bits
    if metrics:
        metrics.write(step=step, **entry)
    each = "".join(f", {name} {nats(loss, bits[name])}" for name, loss in by_name.items())
    model = depth_text(entry["eval_layers"], run.method.shape.num_layers)
    progress.note(f"step {step + 1}: held-out loss of {model} {nats(mean, mean_bits)}{each}")
    events = {f"eval/loss/{name}": loss for name, loss in by_name.items()} | {"eval/loss": mean}
    if mean_bits is not None:
        events["eval/bits_per_byte"] = mean_bits
    engine.write_events(events, step + 1)
    return mean


def _go_back(engine: Engine, store: Store, history: History, step: int) -> int:
    """Loads the last good checkpoint before a step that is to be left out; returns its step.

    Raises:
        Failure: there is none.
    """
    try:
        back = choose_checkpoint(store, "auto")
    except UserError as e:
        raise Failure(f"step {step}: {history.skipped[step]}; {e}") from None
    if back is None:
        raise Failure(
            f"step {step}: {history.skipped[step]}; {store.folder} holds no checkpoint to go back "
            f"to: put them back and start the run again."
        )
    engine.pipe_shares()  # what is trained again is not to be counted twice
    load_checkpoint(engine, store.path(back))
    engine.forget_events(back)
    history.go_back(read_index(store.path(back)).state.get("divergence"))
    return back


def _flops(run: Run, plan: Plan) -> tuple[Flops, Flops]:
    shape, size = run.method.shape, run.flops_size(run.config.batch.global_)
    active = step_flops(shape, plan_loads(plan, shape), **size)
    return active, dense_flops(shape, **size)


def _work_by_phase(run: Run) -> list[float]:
    """FLOPs of one step in every phase."""
    size = run.flops_size(1)
    return [
        step_flops(run.method.shape, run.method.mean_loads(phase), **size).model
        for phase in range(len(run.method.phases))
    ]


def _remaining(run: Run, start: int, work: list[float]):
    """Maps a step to the share of the work from `start` on that is still to do after it."""
    per_step = [work[run.method.phase_at(step)] for step in range(run.config.steps)]
    done = [0.0, *accumulate(per_step)]
    # A run that went back may be before `start`.
    return lambda step: 1.0 - max(0.0, done[step + 1] - done[start]) / (done[-1] - done[start])


def _to_monitor(engine: Engine, entry: dict[str, Any], done: int) -> None:
    shown = ("loss", "lr", "grad_norm", "step_s", "tokens_per_s", "kept_layers")
    events = {f"train/{n}": float(entry[n]) for n in shown if entry[n] is not None}
    events["train/flops_ratio"] = entry["flops_active"] / entry["flops_dense"]
    engine.write_events(events, done)


def _say_start(run: Run, engine: Engine, start: int) -> None:
    config = run.config
    accumulation = config.batch.accumulation(engine.num_replicas)
    say(
        f"{'resuming at' if start else 'starting at'} step {start} of {config.steps}: "
        f"{run.processes} processes = {config.parallel.pipe} pipe stages x {engine.num_replicas} "
        f"replicas, ZeRO {config.parallel.zero}, {config.precision}"
    )
    say(
        f"global_batch {config.batch.global_} = micro_batch {config.batch.micro} x accumulation "
        f"{accumulation} x data_parallel {engine.num_replicas} sequences of "
        f"{config.data.sequence} tokens"
    )
    for line in _corpora(run):
        say(line)


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


def _layout(run: Run, engine: Engine) -> dict[str, Any]:
    """What the times of this start's steps depend on besides their plans."""
    config, on_gpu = run.config, torch.cuda.is_available()
    set_too = {
        "cuts": run.cuts if config.parallel.pipe > 1 else None,
        "offload": config.parallel.offload,
        "activation_checkpointing": config.activation_checkpointing,
        "compile": config.compile,
    }
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    always = {"micro": config.batch.micro, "device": device}
    return engine.layout | always | {name: value for name, value in set_too.items() if value}
