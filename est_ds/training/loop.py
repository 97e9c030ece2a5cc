"""The training loop, top to bottom."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from est_ds.checkpoints.copier import Copier, CopyBoard
from est_ds.checkpoints.index import Index
from est_ds.checkpoints.restore import choose_or_restore
from est_ds.checkpoints.resume import choose_checkpoint, load_checkpoint, load_weights
from est_ds.checkpoints.store import Store
from est_ds.checkpoints.writer import Saver
from est_ds.data.prefetch import Prefetched
from est_ds.data.staging import fetching_s
from est_ds.engine.base import Engine
from est_ds.engine.build import build_engine
from est_ds.engine.start import start_processes
from est_ds.errors import Failure, UserError
from est_ds.ranks.before_training import BeforeTraining
from est_ds.ranks.gather import of_rank_0
from est_ds.ranks.meeting import Meeting
from est_ds.ranks.preempt import Preempted, noticed
from est_ds.ranks.watchdog import Watchdog
from est_ds.ranks.world import World
from est_ds.run.directory import lock_run_dir, write_config
from est_ds.run.prepare import Run
from est_ds.training.agreement import check_agreement, check_hashes
from est_ds.training.boundaries import Boundary, is_boundary
from est_ds.training.clock import Clock
from est_ds.training.divergence import History
from est_ds.training.evaluate import evaluate
from est_ds.training.record import Recorder, Trained, measured_layers
from est_ds.training.state import check_state, first_steps, run_state
from est_ds.training.turns import measure_phases


@dataclass(frozen=True)
class Job:
    """What trains a run in this process."""

    run: Run
    engine: Engine
    store: Store
    saver: Saver
    loader: Prefetched
    history: History
    recorder: Recorder
    watchdog: Watchdog
    clock: Clock


def train(
    run: Run,
    world: World,
    *,
    join: Callable[..., Meeting] = start_processes,
    build: Callable[..., Engine] = build_engine,
) -> None:
    """Trains a run from its latest checkpoint (or from the start) to its last step.

    Args:
        join: joins the process group.
        build: builds the engine.

    Raises:
        UserError: the checkpoint does not fit the run, or a corpus was altered.
        Failure: ranks disagree, or a checkpoint cannot be written.
        Diverged: a loss or a gradient is no number, and `divergence` does not let it go on.
    """
    config = run.config
    lock = lock_run_dir(config) if world.is_first else None
    limit_s = config.watchdog.limit_s
    with BeforeTraining(world) as before:
        meeting = join(world, limit_s + fetching_s(config.data), before.reached)
        with Watchdog(meeting, world, limit_s) as watchdog:
            if config.data.verify == "hashes":
                check_hashes(run, world.local_rank == 0, lambda: watchdog.mark(0, "verifying data"))
            copying = partial(_copying, run, meeting, watchdog)
            _train(run, build, watchdog, before, copying)
    if lock:
        lock.close()


def _train(
    run: Run,
    build: Callable[..., Engine],
    watchdog: Watchdog,
    before: BeforeTraining,
    copying: Callable[..., AbstractContextManager[Copier | None]],
) -> None:
    config, world = run.config, World.from_environment()
    store = Store.of(run.directory)
    resumed = choose_or_restore(store, config, lambda: watchdog.go_on("fetching a checkpoint"))
    start = resumed.step if resumed else 0
    check_state(run, resumed)
    if world.is_first:
        write_config(config)
    engine = build(run, world)
    if resumed:
        load_checkpoint(engine, store, resumed)
    elif run.has_weights:
        watchdog.mark(0, "reading weights")
        load_weights(engine)
    engine.forget_events(start)
    loader = Prefetched(run.train, config.steps, engine.portion)
    history = History(config.divergence, first_steps(run), resumed and resumed.state.divergence)
    with (
        Recorder(run, engine, start) as recorder,
        loader,
        copying(store, recorder) as copier,
        Saver(engine, store, copier) as saver,
    ):
        check_agreement(run, start)
        clock = Clock(resumed.state.trained_s if resumed else 0.0)
        job = Job(run, engine, store, saver, loader, history, recorder, watchdog, clock)
        saver.check_space()
        before.begin()
        _begin(job, start, resumed)
        step, began = start, time.monotonic()
        while step < config.steps:
            watchdog.mark(step, "training")
            if train_step(job, step):
                step += 1
                after_step(job, step)
            else:
                step = go_back(job, step)
        if config.log.step_times and start < config.steps:
            _measure(job, time.monotonic() - began)


def _copying(
    run: Run, meeting: Meeting, watchdog: Watchdog, store: Store, recorder: Recorder
) -> AbstractContextManager[Copier | None]:
    """What copies the checkpoints to a bucket, if the run asks for it. Every rank calls it."""
    settings = run.config.checkpoint
    if settings.copy_to is None:
        return nullcontext()
    board = CopyBoard(meeting.connect, of_rank_0(secrets.token_hex(8)))
    goes_on = partial(watchdog.go_on, "waiting for copies of checkpoints")
    return Copier(store, settings, board, recorder.note, goes_on)


def _begin(job: Job, start: int, resumed: Index | None) -> None:
    """Does what the checkpoint left to be done; a run that may go back needs one to go back to, and
    one that begins with published weights needs them no more."""
    if resumed and resumed.state.evaluation_due:  # a notice cut it short
        job.recorder.evaluated(start - 1, evaluate(job.run, job.engine, start - 1))
    if (job.run.config.divergence.rolls_back or job.run.has_weights) and not resumed:
        job.saver.save(0, run_state(job.run, 0, job.history, 0.0), None)


def _begin_phase(job: Job, step: int) -> None:
    """Grows the model where a phase begins so; compares the sides of a boundary where asked to.

    Raises:
        Preempted: a notice came before they were compared.
    """
    run, engine, before = job.run, job.engine, None

    def interrupted() -> bool:  # the sides take many evaluations, each of which goes on
        job.watchdog.mark(step, "evaluating")
        return noticed()

    compares = run.config.evaluate.boundaries and is_boundary(run, step)
    boundary = Boundary(run, engine, step, interrupted)
    growth = run.method.growth(step)
    # A checkpoint before it has just been written, or loaded: neither crash nor notice loses any.
    if compares:
        before = boundary.side("before")
    if growth and (before or not compares):
        engine.grow(growth)
    if compares:
        after = before and boundary.side("after", None if growth else before.full)
        if not before or not after:
            job.saver.finish()
            raise Preempted(step)
        job.recorder.at_boundary(step, before, after)


def train_step(job: Job, step: int) -> bool:
    """Trains a step, or leaves it out as the policy says; False if the run must go back."""
    run, engine, history = job.run, job.engine, job.history
    _begin_phase(job, step)
    plans, trained = run.plans(step), None
    if history.begin(step):
        rate = run.learning_rate(step)
        engine.set_learning_rate(rate)
        layers = measured_layers(run, step)
        before = engine.layer_weights(layers) if layers else None
        began, cpu_began = time.perf_counter(), time.process_time()
        with engine.subnetwork.active(plans):
            loss = engine.train_batch(job.loader.micro_batches(step))
        took = job.clock.ran(time.perf_counter() - began, time.process_time() - cpu_began)
        if history.judge(step, loss, engine.grad_norm) == "roll back":
            return False
        moved = before.rms_to(engine.layer_weights(layers)) if before else None
        norm = engine.grad_norm
        trained = Trained(plans, loss, rate, norm, took, history.spike, moved)
    # Of this phase: not to be counted in the next.
    shares = engine.pipe_shares() if step + 1 == run.method.phase_of(step).until_step else None
    if reason := history.skipped.get(step):
        engine.set_steps_done(step + 1)
        job.recorder.left_out(step, reason)
    else:
        job.recorder.trained(trained, shares)
    return True


def after_step(job: Job, done: int) -> None:
    """Evaluates and saves where that is due after `done` steps, and heeds a notice.

    Raises:
        Preempted: there was a notice, and the run is saved.
        Failure: ranks disagree, or a checkpoint cannot be written.
    """
    run, config = job.run, job.run.config
    is_last, eval_loss, notice = done == config.steps, None, noticed()
    evaluation_due = is_last or done % config.evaluate.every == 0
    if evaluation_due and (is_last or not notice):
        job.watchdog.mark(done, "evaluating")
        found = evaluate(run, job.engine, done - 1, None if is_last else noticed)
        notice = found is None
        if found is not None:
            eval_loss = job.recorder.evaluated(done - 1, found)
    job.saver.poll()
    is_end = done == run.method.phase_of(done - 1).until_step
    if done % config.checkpoint.every == 0 or is_end or notice:
        job.watchdog.mark(done, "saving")
        job.recorder.sync()
        check_agreement(run, done)
        left_over = evaluation_due and eval_loss is None
        state = run_state(run, done, job.history, job.clock.trained_s, left_over)
        job.saver.save(done, state, eval_loss)
        notice = notice or noticed()
    if notice and not is_last:
        job.saver.finish()
        raise Preempted(done)


def _measure(job: Job, trained_s: float) -> None:
    """Times the phases in turns; the run is done and saved, and the engine is not needed any more.

    Args:
        trained_s: how long the steps of this start took.
    """
    job.saver.settle()  # what is sent meanwhile takes time from the steps
    steps = job.run.config.steps
    times = measure_phases(
        job.run, job.engine, trained_s, lambda: job.watchdog.mark(steps, "measuring step times")
    )
    if times:
        job.recorder.measured(times)


def go_back(job: Job, step: int) -> int:
    """Loads the last good checkpoint before a step that is to be left out; returns its step.

    Raises:
        Failure: there is none.
    """
    reason = f"step {step}: {job.history.skipped[step]}"
    job.saver.finish()
    job.watchdog.mark(step, "going back")
    job.recorder.note(f"{reason}; going back")
    try:
        back = choose_checkpoint(job.store, "auto")
    except UserError as e:
        raise Failure(f"{reason}; {e}") from None
    if back is None:
        raise Failure(
            f"{reason}; {job.store.folder} holds no checkpoint to go back to: put them back and "
            f"start the run again."
        )
    job.engine.pipe_shares()  # what is trained again is not to be counted twice
    load_checkpoint(job.engine, job.store, back)
    job.engine.forget_events(back.step)
    job.history.go_back(back.state.divergence)
    job.clock.go_back(back.state.trained_s)
    job.recorder.went_back(back.step)
    return back.step
