"""Measures steps in turns, in rounds: one of each phase of a run, or of several runs.

Times of different hours of a machine are no figures to compare: in a round every design has the
same minute. These are whole steps, on the engine's real state: an engine that has measured must not
be saved any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from est_ds.cost.flops import computes_everything
from est_ds.engine.base import Engine, MicroBatch
from est_ds.plans.plan import StepPlans, full_plan
from est_ds.ranks.gather import gathered_on_rank_0, of_rank_0
from est_ds.ranks.preempt import noticed
from est_ds.ranks.processors import UseSince
from est_ds.run.prepare import Run
from est_ds.run.step_times import StepTimes, Turns
from est_ds.training.record import layout_of

FEWEST, MOST = 6, 24  # rounds; fewer give no interval
# At the end of a run as many rounds as fit into this share of the time that it trained, or into
# seconds that do not matter; none where the fewest would take more than the largest share.
SHARE, LEAST_S, LARGEST_SHARE = 0.03, 6.0, 0.2


@dataclass(frozen=True)
class Measured:
    """A run whose steps are measured.

    Args:
        name: of the run, where there are several.
        batches: the micro-batches of this process, of any step.
    """

    name: str
    run: Run
    engine: Engine
    batches: list[MicroBatch]

    @classmethod
    def of(cls, name: str, run: Run, engine: Engine) -> Measured:
        """From now on the engine measures: its weights stay, its moments do not."""
        engine.only_measure()
        last = run.config.steps - 1
        return cls(name, run, engine, list(run.train.micro_batches(last, engine.portion)))

    def turns(self) -> list[Turn]:
        """One for every phase."""
        return [Turn(self, i) for i in range(len(self.run.method.phases))]

    def full(self) -> Turn:
        """That of the full model: the last phase that computes it, or none of the phases."""
        return Turn(self, max(full_phases(self.run), default=None))


def full_phases(run: Run) -> list[int]:
    """The phases that compute the full model."""
    method, sequence = run.method, run.config.data.sequence
    return [i for i in range(len(method.phases)) if computes_everything(method, i, sequence)]


@dataclass
class Turn:
    """What takes a turn in every round, and how long each took in this process.

    Attributes:
        phase: its number; None: the full model.
    """

    of: Measured
    phase: int | None
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    device_s: list[float] = field(default_factory=list)

    def take(self, round: int) -> None:
        """Times a step of the phase; those of all rounds together lie evenly over it."""
        before, plans = self._plans(_spread(round))
        if self.of.run.config.parallel.zero == 3:
            self._step(before)  # as in training it then knows in what order to gather
        wall_s, cpu_s, device_s = _timed(lambda: self._step(plans))
        self.wall_s.append(wall_s)
        self.cpu_s.append(cpu_s)
        if device_s is not None:
            self.device_s.append(device_s)

    def forget(self) -> None:
        """Forgets what was measured: the first turn allocates, connects and compiles."""
        self.wall_s, self.cpu_s, self.device_s = [], [], []

    def result(self, cpu_s: list[float]) -> Turns:
        """What it measured.

        Args:
            cpu_s: of all processes.
        """
        method, phase = self.of.run.method, self.phase
        within = None if phase is None else method.phases[phase]
        return Turns(
            run=self.of.name,
            name=within.name if within else "full model",
            phase=phase,
            num_steps=within.until_step - within.from_step if within else 0,
            wall_s=tuple(self.wall_s),
            cpu_s=tuple(cpu_s),
            device_s=tuple(self.device_s) or None,
        )

    def _plans(self, share: float) -> tuple[StepPlans, StepPlans]:
        """Of two steps in a row."""
        run = self.of.run
        if self.phase is None:
            parts = [tuple(p.units for p in layer) for layer in run.method.shape.layers]
            plan = full_plan(run.config.steps - 1, len(run.method.phases) - 1, parts)
            plans = StepPlans(plan.step, 1, lambda _: plan)
            return plans, plans
        phase = run.method.phases[self.phase]
        step = phase.from_step + int(share * (phase.until_step - phase.from_step))
        return run.plans(max(step - 1, phase.from_step)), run.plans(step)

    def _step(self, plans: StepPlans) -> None:
        engine = self.of.engine
        with engine.subnetwork.active(plans):
            engine.train_batch(iter(self.of.batches))


def measure_phases(
    run: Run, engine: Engine, trained_s: float, goes_on: Callable[[], None]
) -> StepTimes | None:
    """Measures the phases of a run that is done in turns with its full model.

    Every process calls it together. Without a phase that trains the full model, that is measured
    too, but on a GPU, whose memory it might not fit.

    Args:
        trained_s: seconds that the run has trained, by which its measurement is limited.
        goes_on: called before every turn.

    Returns:
        On rank 0; None elsewhere, where there is nothing to compare, where `FEWEST` rounds would
        last too long, and after a notice.
    """
    full = full_phases(run)
    if len(full) == len(run.method.phases) or (not full and torch.cuda.is_available()):
        return None
    measured, began = Measured.of("", run, engine), time.monotonic()
    baseline = measured.full()
    turns = [baseline, *(turn for turn in measured.turns() if turn.phase != baseline.phase)]
    goes_on()
    baseline.take(0)
    fewest_s = (time.monotonic() - began) * len(turns) * (FEWEST + 1)
    if of_rank_0(fewest_s > LARGEST_SHARE * trained_s):
        return None
    return take_turns(turns, max(SHARE * trained_s, LEAST_S), goes_on)


def take_turns(
    turns: list[Turn], limit_s: float, goes_on: Callable[[], None] = lambda: None
) -> StepTimes | None:
    """Measures rounds of turns; every process calls it together.

    Args:
        turns: the first is what the others are compared with.
        limit_s: rounds end where another one would last longer, but not before `FEWEST`.
        goes_on: called before every turn.

    Returns:
        On rank 0; None elsewhere, and after a notice.
    """
    for turn in turns:
        goes_on()
        turn.take(0)
        turn.forget()
    use, began = UseSince(), time.monotonic()
    for number in range(MOST):
        passed_s = time.monotonic() - began
        is_late = number >= FEWEST and passed_s * (number + 1) / number > limit_s
        if noticed():
            return None
        if of_rank_0(is_late):
            break
        for turn in turns:
            goes_on()
            turn.take(number)
    used = use.read()
    everyone = gathered_on_rank_0([turn.cpu_s for turn in turns])
    if used is None:
        return None
    of = turns[0].of
    cpu_s = [[sum(of_all) for of_all in zip(*one)] for one in zip(*everyone)]
    return StepTimes(
        turns=tuple(turn.result(seconds) for turn, seconds in zip(turns, cpu_s)),
        processors=used.processors,
        others=used.others,
        layout=layout_of(of.run, of.engine),
    )


def _spread(number: int) -> float:
    """Van der Corput's sequence: 1/2, 1/4, 3/4, 1/8, ...: however many there are, they lie evenly
    over 0 to 1."""
    number, share, half = number + 1, 0.0, 0.5
    while number:
        number, bit = divmod(number, 2)
        share, half = share + bit * half, half / 2
    return share


def _timed(work: Callable[[], None]) -> tuple[float, float, float | None]:
    """Wall-clock, processor seconds of this process, and those of its GPU, if there is one."""
    if not torch.cuda.is_available():
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        work()
        return time.perf_counter() - wall_s, time.process_time() - cpu_s, None
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    passed_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return *passed_s, start.elapsed_time(end) / 1000.0
