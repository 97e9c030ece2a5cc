"""Trains a short run twice, once killed and resumed, and compares the two."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from est_ds.checkpoints.store import LATEST, Store
from est_ds.config.run_config import RunConfig
from est_ds.config.run_file import load_run
from est_ds.config.sections import Checkpoint
from est_ds.design import make_design
from est_ds.errors import Failure, UserError
from est_ds.launch.launcher import launch
from est_ds.launch.placement import check_processes, default_processes, this_machine
from est_ds.ranks.preempt import EXIT_CODE
from est_ds.ranks.world import launched
from est_ds.run.directory import differences
from est_ds.run.metrics import read_metrics
from est_ds.run.prepare import prepare
from est_ds.verify_resume.compare import Bounds, Comparison, compare_runs
from est_ds.verify_resume.short import default_cut, shortened

# Another layout adds up in another order; what was seen stands in configs/CHECKPOINTS.md.
OTHER_LAYOUT = {
    "fp32": Bounds(loss=1e-5, grad_norm=1e-5, weight=1e-5, moment=1e-5),
    "bf16": Bounds(loss=1e-3, grad_norm=2e-2, weight=2e-2, moment=2e-2),
}
SHOWN_OF_LOG = 12


@dataclass(frozen=True)
class Half:
    """A run, and the processes that train it."""

    config: RunConfig
    processes: int

    def __str__(self) -> str:
        parallel = self.config.parallel
        return f"{self.processes} processes (pipe {parallel.pipe}, ZeRO {parallel.zero})"


@dataclass(frozen=True)
class Wanted:
    """What the user says of a check; None leaves the choice to it.

    Attributes:
        steps: of the short run; None: the fewest that its phases fit into, 12 at least.
        cut: the checkpoint to resume from; None: near the middle, before a phase boundary.
        processes: of the run up to the kill.
        then_processes: of the run that resumes; None: as many.
        keep: folder for the two run directories; None: one that is removed at the end.
    """

    steps: int | None = None
    cut: int | None = None
    processes: int | None = None
    then_processes: int | None = None
    keep: Path | None = None


class ResumeCheck:
    """A run trained without interruption, and trained, killed and resumed.

    Args:
        folder: where both run directories go.
        first: the run, and the layout of both runs up to the kill.
        then: the same run in the layout that resumes it.
        cut: steps done at the checkpoint that is resumed.
    """

    def __init__(self, folder: Path, first: Half, then: Half, cut: int) -> None:
        self.folder, self.first, self.then, self.cut = folder, first, then, cut
        self.uninterrupted, self.interrupted = folder / "uninterrupted", folder / "interrupted"

    @property
    def same_layout(self) -> bool:
        return self.first == self.then

    def train_uninterrupted(self) -> None:
        self._train("uninterrupted", self.first, self.uninterrupted, keep_last=1)

    def train_and_kill(self) -> int:
        """Kills the run some steps after its checkpoint.

        Returns:
            Steps that it had logged by then.
        """
        store = Store.of(self.interrupted)

        def is_past_the_cut() -> bool:
            logged, _ = read_metrics(self.interrupted)
            is_saved = (store.named(LATEST) or 0) >= self.cut
            return is_saved and logged[-1]["step"] >= self.cut

        # All are kept: the one to resume from must be there however late the kill comes.
        self._train("killed", self.first, self.interrupted, keep_last=0, kill_when=is_past_the_cut)
        for step in store.steps():
            if step > self.cut:  # as if it had been killed before
                shutil.rmtree(store.path(step))
        return read_metrics(self.interrupted)[0][-1]["step"] + 1

    def resume(self) -> None:
        before = self._lines_before_the_cut()
        self._train("resumed", self.then, self.interrupted, keep_last=1)
        # With their times: a run that had begun anew would have written others.
        if self._lines_before_the_cut() != before:
            raise Failure(f"the run did not resume from step {self.cut}: it trained earlier ones.")

    def compare(self) -> Comparison:
        bounds = Bounds() if self.same_layout else OTHER_LAYOUT[self.first.config.precision]
        return compare_runs(self.uninterrupted, self.interrupted, bounds, exact_until=self.cut)

    def _train(
        self,
        name: str,
        half: Half,
        run_dir: Path,
        keep_last: int,
        kill_when: Callable[[], bool] | None = None,
    ) -> None:
        settings = half.config.checkpoint.model_dump()
        settings |= {"every": self.cut, "keep_last": keep_last, "keep_best": False}
        settings["keep_every"] = None
        update = {"run_dir": str(run_dir), "checkpoint": Checkpoint(**settings)}
        file, log = (self.folder / f"{name}.{ending}" for ending in ("yaml", "log"))
        file.write_text(half.config.model_copy(update=update).to_yaml())
        with log.open("w") as f:
            where = this_machine(half.config, half.processes)
            limit_s = half.config.watchdog.limit_s
            code = launch(["train", str(file)], where, limit_s, f, kill_when)
        if code in (128 + signal.SIGINT, 128 + signal.SIGHUP, EXIT_CODE):
            raise SystemExit(code)
        if kill_when is not None and code == 0:
            raise Failure("the run ended before it could be killed; use more --steps.")
        if code != (0 if kill_when is None else 128 + signal.SIGKILL):
            last = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_OF_LOG:])
            raise Failure(f"the {name} run ended with exit code {code}; it said at last:\n{last}")

    def _lines_before_the_cut(self) -> list[dict]:
        return [line for line in read_metrics(self.interrupted)[0] if line["step"] < self.cut]


def verify_resume(
    run: str,
    overrides: list[str],
    then: list[str],
    wanted: Wanted,
) -> Comparison:
    """Trains a run in few steps, kills it, resumes it, and compares it with itself.

    Args:
        run: run file or run directory; only its config is read.
        overrides: changes to the run.
        then: more of them, for the layout that resumes it.

    Raises:
        UserError: something does not fit; nothing has been started.
        Failure: a run failed.
    """
    if launched():
        raise UserError("verify-resume starts its processes itself; call it without a launcher.")
    with ExitStack() as stack:
        if wanted.keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="est-ds-")))
        else:
            folder = _empty_folder(wanted.keep)
        config, then_config = load_run(run, overrides), load_run(run, [*overrides, *then])
        check = _checked(folder, config, then_config, wanted)
        if wanted.keep is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return _carry_out(check)


def _checked(folder: Path, config: RunConfig, then: RunConfig, wanted: Wanted) -> ResumeCheck:
    if differing := differences(config, then):
        raise UserError(
            f"--then changes what is trained ({differing[0]}); it may change parallel.*, "
            f"activation_checkpointing, compile, deepspeed.*, and batch.micro if neither "
            f"method.draw=micro_batch nor dropout depends on it."
        )
    short = shortened(config, wanted.steps)
    cut = wanted.cut or default_cut(make_design(short).method.phases, short.steps)
    if cut >= short.steps:
        raise UserError(f"--at={cut} is not inside the run; use 1 to {short.steps - 1}.")
    processes = wanted.processes or default_processes(config)
    then_processes = wanted.then_processes or wanted.processes or default_processes(then)
    halves = [Half(short, processes), Half(shortened(then, short.steps), then_processes)]
    for half in halves:
        check_processes(half.processes)
        prepare(half.config.model_copy(update={"run_dir": str(folder / "none")}), half.processes)
    return ResumeCheck(folder, *halves, cut)


def _carry_out(check: ResumeCheck) -> Comparison:
    config, steps = check.first.config, check.first.config.steps
    phases = make_design(config).method.phases
    shown = ", ".join(f"{p.name} {p.from_step}-{p.until_step}" for p in phases)
    print(f"{steps} steps (phases: {shown}), {config.precision}")
    _timed(f"training on {check.first}", check.train_uninterrupted)
    lost = _timed("training again, to be killed (SIGKILL)", check.train_and_kill)
    print(f"killed when step {lost} of {steps} was done, its last checkpoint of step {check.cut}")
    _timed(f"resuming on {check.then}", check.resume)
    return check.compare()


def _timed(what: str, function: Callable):
    print(f"{what} ...", end=" ", flush=True)
    began = time.monotonic()
    result = function()
    print(f"{time.monotonic() - began:.1f} s", flush=True)
    return result


def _empty_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--keep={str(folder)!r} is there and not an empty folder; choose another.")
    return folder
