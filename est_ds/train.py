"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch.distributed as dist

import est_ds
from est_ds.engine.base import Engine
from est_ds.engine.build import build_engine
from est_ds.engine.checkpoint import latest_step, load_checkpoint, save_checkpoint
from est_ds.engine.setup import start_processes
from est_ds.errors import UserError
from est_ds.flops import Flops, dense_flops, step_flops
from est_ds.lr import learning_rate
from est_ds.metrics import MetricsFile
from est_ds.plans.methods.base import plan_loads
from est_ds.progress import Progress
from est_ds.run import Run, lock_run_dir, write_config
from est_ds.runtime import World, say


def train(run: Run, world: World) -> None:
    """Trains a run from its latest checkpoint (or from the start) to its last step.

    Raises:
        UserError: the checkpoint does not fit the run.
        RuntimeError: the loss is no number, or ranks disagree about plan or data.
    """
    config, method, directory = run.config, run.method, run.directory
    checkpoints = directory / "checkpoints"
    lock = lock_run_dir(config) if world.is_first else None
    start_processes(world)
    start = latest_step(checkpoints) or 0
    if world.is_first:
        write_config(config)
    engine = build_engine(
        config, run.hf_config, run.family, method, world, str(directory / "tensorboard")
    )
    if start:
        _check_state(run, load_checkpoint(engine, checkpoints, start))
    metrics = MetricsFile(directory, start) if world.is_first else None
    _say_start(run, engine, start)
    _check_agreement(run, start)

    work = _work_by_phase(run)
    ends = {phase.until_step for phase in method.phases}
    with Progress(config.steps, start, _remaining(run, start, work), world.is_first) as progress:
        for step in range(start, config.steps):
            began = time.perf_counter()
            if growth := method.growth(step):
                # A checkpoint before it has just been written, or loaded: a crash loses nothing.
                engine.grow(growth)
            plan = method.plan(step)
            rate = learning_rate(config.schedule, config.optimizer.lr, step, config.steps)
            engine.set_learning_rate(rate)
            batches = run.train.micro_batches(
                step, rank=engine.replica, world=engine.num_replicas, micro=config.batch.micro
            )
            with engine.subnetwork.active(plan):
                loss = engine.train_batch(batches)
            step_s = time.perf_counter() - began
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"the loss of step {step} is {loss}; resume from an earlier checkpoint with a "
                    f"lower optimizer.lr, or with precision=fp32"
                )

            done = step + 1
            phase = method.phases[plan.phase].name
            tokens_per_s = run.tokens_per_step / step_s
            progress.step(step, phase, loss, tokens_per_s)
            if done % config.log.every == 0 or done in ends:
                active, dense = _flops(run, plan)
                entry = {
                    "step": step,
                    "phase": phase,
                    "loss": loss,
                    "lr": rate,
                    "grad_norm": engine.grad_norm,
                    "tokens": done * run.tokens_per_step,
                    "step_s": step_s,
                    "tokens_per_s": tokens_per_s,
                    "flops_active": active.model,
                    "flops_dense": dense.model,
                    "blocks_active": active.blocks,
                    "blocks_dense": dense.blocks,
                    "kept_layers": len(plan.kept_layers),
                    "plan_digest": plan.digest,
                    "data_digest": run.train.digest(step),
                }
                if metrics:
                    metrics.write(**entry)
                _to_monitor(engine, entry, done * config.batch.global_)
            if done % config.evaluate.every == 0 or done == config.steps:
                eval_loss = evaluate(run, engine, step)
                if metrics:
                    metrics.write(step=step, eval_loss=eval_loss)
                progress.note(f"step {done}: held-out loss of the full model {eval_loss:.4f}")
                engine.write_events({"eval/loss": eval_loss}, done * config.batch.global_)
            if done % config.checkpoint.every == 0 or done in ends:
                _check_agreement(run, step)
                save_checkpoint(engine, checkpoints, done, _state(run, done))
    if metrics:
        metrics.close()
    if lock:
        lock.close()


def evaluate(run: Run, engine: Engine, step: int) -> float:
    """Mean held-out loss of the full model, nats per token; the same in every layout.

    A model that still grows is evaluated as deep as it is at `step`.
    """
    config = run.config
    batches = list(
        run.valid.held_out(
            config.evaluate.sequences,
            rank=engine.replica,
            world=engine.num_replicas,
            micro=config.batch.micro,
        )
    )
    rows = len(batches) * config.batch.micro * engine.num_replicas
    whole = run.method.whole(step)
    with engine.subnetwork.active(whole) if whole else nullcontext():
        return engine.mean_loss(batches) * rows / config.evaluate.sequences


def _state(run: Run, done: int) -> dict[str, Any]:
    """What a checkpoint holds besides weights and optimizer."""
    return {
        "est_ds": est_ds.__version__,
        "step": done,
        "config": run.config.model_dump(mode="json", by_alias=True),
        "corpus": run.train.corpus.fingerprint,
    }


def _check_state(run: Run, state: dict[str, Any]) -> None:
    if state["corpus"] != run.train.corpus.fingerprint:
        raise UserError(
            f"data.train={run.config.data.train!r} is not the corpus that the checkpoint was "
            f"trained on (fingerprint {run.train.corpus.fingerprint}, not {state['corpus']}); "
            f"point it to that corpus, or start a new run_dir."
        )


def _check_agreement(run: Run, step: int) -> None:
    """All ranks must draw the same plan and read the same data.

    Raises:
        RuntimeError: they do not; DeepSpeed would silently mix gradients of different layers.
    """
    step = min(step, run.config.steps - 1)
    mine = (run.method.plan(step).digest, run.train.digest(step), run.config.steps)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    odd = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if odd:
        raise RuntimeError(
            f"ranks {odd} disagree with rank 0 about the plan or the data of step {step}: "
            f"they run another version of est_ds, of the run file or of the corpus"
        )


def _flops(run: Run, plan) -> tuple[Flops, Flops]:
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
    per_step = [work[run.method.phase_at(step)] for step in range(start, run.config.steps)]
    done = list(accumulate(per_step))
    return lambda step: 1.0 - done[step - start] / done[-1]


def _to_monitor(engine: Engine, entry: dict[str, Any], samples: int) -> None:
    shown = ("loss", "lr", "grad_norm", "step_s", "tokens_per_s", "kept_layers")
    events = {f"train/{n}": float(entry[n]) for n in shown if entry[n] is not None}
    events["train/flops_ratio"] = entry["flops_active"] / entry["flops_dense"]
    engine.write_events(events, samples)


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
