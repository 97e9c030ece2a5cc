"""Step times of several runs against one of them, in turns, in one group of processes.

`measure_runs` starts the launcher; in each process it runs this module, in which the baseline's
engine stays while those of the others come and go, one at a time.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

import torch

from est_ds.checkpoints.resume import load_weights
from est_ds.config.run_file import load_run
from est_ds.engine.build import build_engine
from est_ds.engine.patches import forget_former_pipeline
from est_ds.engine.start import leave_processes, start_processes
from est_ds.errors import Failure, UserError
from est_ds.launch.launcher import launch
from est_ds.launch.placement import this_machine
from est_ds.ranks import preempt
from est_ds.ranks.watchdog import Watchdog
from est_ds.ranks.world import World, end_with_starter, say
from est_ds.run.prepare import check_run, prepare
from est_ds.run.step_times import StepTimes
from est_ds.training.turns import Measured, Turn, take_turns

MODULE = "est_ds.training.time_runs"
LIMIT_S = 20.0  # rounds of a pair
GAVE_UP_S = 600.0  # without a turn


@dataclass(frozen=True)
class TimedRun:
    """A run whose steps are to be measured.

    Attributes:
        run: a run file or directory; nothing is written into its directory.
    """

    name: str
    run: str
    overrides: tuple[str, ...] = ()


def measure_runs(
    runs: Sequence[TimedRun],
    processes: int | None = None,
    limit_s: float = LIMIT_S,
    log: TextIO | None = None,
) -> dict[str, StepTimes]:
    """Measures every phase of runs in turns with the full model of the first, on this machine.

    Args:
        runs: the first is the baseline; the others are measured one after the other. One alone is
            measured with its own full model.
        processes: default: what the baseline's file says.
        limit_s: for the rounds of each run.
        log: takes what the processes say.

    Returns:
        By the name of each other run, or of the only one; `StepTimes.run_ratios` has its seconds
        over the baseline's.

    Raises:
        UserError: a run file is wrong.
        Failure: they could not be measured; what the processes say tells why.
        SystemExit: a signal has ended it.
    """
    where = this_machine(load_run(runs[0].run, list(runs[0].overrides)), processes)
    for run in runs:
        check_run(load_run(run.run, list(run.overrides)), where.processes)  # raises
    with TemporaryDirectory(prefix="est-ds-times-") as folder:
        wanted, found = Path(folder, "wanted.json"), Path(folder, "found.json")
        given = [[run.name, str(run.run), list(run.overrides)] for run in runs]
        wanted.write_text(json.dumps({"runs": given, "limit_s": limit_s, "found": str(found)}))
        where = replace(where, module=MODULE)
        code = launch([str(wanted)], where, GAVE_UP_S, log)
        if code == preempt.EXIT_CODE or code > 128:
            sys.exit(code)
        if code or not found.exists():
            raise Failure(f"step times could not be measured (exit code {code}).")
        by_name = json.loads(found.read_text())
    return {name: StepTimes.model_validate(times) for name, times in by_name.items()}


def main(arguments: list[str]) -> None:
    """What one process of the launcher does.

    Args:
        arguments: the file that `measure_runs` has written; the rest is for the launcher.
    """
    signal.signal(signal.SIGUSR1, lambda *_: preempt.end(None))  # there is nothing to save
    world = World.from_environment()
    end_with_starter()
    try:
        wanted = json.loads(Path(arguments[0]).read_text())
        meeting = start_processes(world, GAVE_UP_S)
        with Watchdog(meeting, world, GAVE_UP_S) as watchdog:
            found = _measure(wanted["runs"], wanted["limit_s"], watchdog)
        if world.is_first:
            Path(wanted["found"]).write_text(json.dumps(found))
    except (UserError, Failure) as e:
        print(f"est-ds: {e}", file=sys.stderr, flush=True)
        leave_processes(2 if isinstance(e, UserError) else 1)
    leave_processes()


def _measure(
    runs: list[tuple[str, str, list[str]]], limit_s: float, watchdog: Watchdog
) -> dict[str, dict]:
    """Measures each run with the first, or one alone; on rank 0 what was found, elsewhere
    nothing."""
    world, found = World.from_environment(), {}

    def measured(number: int) -> Measured:
        name, run_file, overrides = runs[number]
        watchdog.mark(number, f"building {name}")
        forget_former_pipeline()
        run = prepare(load_run(run_file, overrides), world.size)
        engine = build_engine(run, world)
        if run.has_weights:
            load_weights(engine)
        return Measured.of(name, run, engine)

    def note(number: int, name: str, turns: list[Turn]) -> None:
        times = take_turns(turns, limit_s, lambda: watchdog.mark(number, "measuring"))
        if times is not None:
            found[name] = times.model_dump(mode="json")

    baseline = measured(0)
    full = baseline.full()
    if len(runs) == 1:
        phases = [turn for turn in baseline.turns() if turn.phase != full.phase]
        note(0, baseline.name, [full, *phases])
    for number in range(1, len(runs)):
        other = measured(number)
        say(f"measuring {other.name} and {baseline.name} in turns")
        note(number, other.name, [baseline.full(), *other.turns()])
        del other
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
