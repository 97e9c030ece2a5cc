"""`est-ds compare STUDY`: trains what is missing, and says which arms pay."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from est_ds.config.run_file import load_run
from est_ds.data.indexed import Corpus
from est_ds.disk import hold
from est_ds.errors import Failure, UserError, did_you_mean
from est_ds.launch.signals import Signals
from est_ds.report.style import check_ending
from est_ds.run.metrics import steps_logged
from est_ds.studies.answers import Answers, answer
from est_ds.studies.checks import check_study
from est_ds.studies.collect import clear, collect, keep_windows
from est_ds.studies.measure import measure
from est_ds.studies.page import write_page
from est_ds.studies.picture import write_study_figure
from est_ds.studies.queue import Places, Running, Watcher, processes_of, train_all
from est_ds.studies.results import Header, Results, read_results
from est_ds.studies.runs import (
    Chooser,
    Runs,
    StudyRun,
    Wanted,
    fingerprints,
    key_of,
    wanted_runs,
)
from est_ds.studies.snapshot import Snapshot
from est_ds.studies.study_file import StudyFile, load_study
from est_ds.studies.tasks import check_evaluate, scores_of
from est_ds.studies.text import answers_json, answers_text, times_text, verdicts
from est_ds.studies.times import known_ratios
from est_ds.studies.todo import Todo, expected_s, make_todo, todo_json, todo_text
from est_ds.training.progress import clock
from est_ds.training.time_runs import LIMIT_S

LOCK = ".lock"
BEAT_S = 30.0


@dataclass(frozen=True)
class Wish:
    """What the command line asks for.

    Attributes:
        jobs: runs beside each other; None: as many as fit.
        only: train the runs of this arm, and those of the baseline that it needs.
        add_seeds: further seeds.
        json: print JSON and nothing else.
        dry_run: say what would be trained.
        time_only: measure step times, and train nothing.
        answer_only: answer from what is done, and train nothing.
        plot: file to draw the answer into.
    """

    jobs: int | None = None
    only: str | None = None
    add_seeds: int = 0
    json: bool = False
    dry_run: bool = False
    time_only: bool = False
    answer_only: bool = False
    plot: str | None = None


def compare(path: str, wish: Wish) -> int:
    """Trains the runs of a study that are not done, and answers.

    Returns:
        Exit code: 0 done, 1 a run failed, 75 or 128 + n after a signal.

    Raises:
        UserError: the study file, an arm, or the results do not fit; the plot cannot be written.
    """
    if wish.plot:
        check_ending(Path(wish.plot))
    study = open_study(path, wish)
    if wish.dry_run:
        todo = study.list_todo()
        print(todo_json(todo) if wish.json else todo_text(todo))
        return 0
    try:
        lock = hold(study.file.folder / LOCK)
    except BlockingIOError:
        raise UserError(
            f"study_dir={study.file.study.study_dir!r} is being trained by another process; wait "
            f"for it, stop it, or choose another study_dir."
        ) from None
    except OSError as e:
        raise UserError(
            f"study_dir={study.file.study.study_dir!r} cannot be written ({e.strerror}); mend "
            f"that, or choose another study_dir."
        ) from None
    with lock:
        study.results = read_results(study.file.results, repair=True)
        study.results.begin(study.header)
        code = 0 if wish.answer_only else study.work()
    study.show()
    return code


def open_study(path: str, wish: Wish) -> Session:
    """Reads study and results, and checks them against each other; writes nothing.

    Raises:
        UserError: the study file, an arm, or the results do not fit.
    """
    file = load_study(path)
    results = read_results(file.results)
    arms = file.arms.keys()
    if wish.only is not None and wish.only not in arms:
        raise UserError(
            f"--only={wish.only!r} is no arm of {path}; {did_you_mean(wish.only, arms)}use one of "
            f"{', '.join(arms)}."
        )
    if wish.add_seeds and not file.study.intervals:
        raise UserError(
            "--add-seeds has no effect on a pilot; remove intervals=false, and list two seeds."
        )
    own, added = max(file.seeds), {r.seed for r in results.runs.values() if r.arm in arms}
    # Those that --add-seeds has trained; to leave some out would choose by what they show.
    file = file.with_seeds({seed for seed in added if seed > own})
    file = file.with_seeds(set(range(own + 1, own + 1 + wish.add_seeds)))
    runs = Runs(file)
    check_study(runs)
    check_evaluate(runs)
    header = _header(runs)
    if results.header:
        results.begin(header)  # compares, and writes nothing
    session = Session(file, wish, runs, results, header)
    if header.corpora is None and not wish.dry_run and session.todo():
        data = runs.first.config.data
        for prefix in (*(part.corpus for part in data.parts), *data.held_out.values()):
            Corpus.open(prefix)  # says what is missing
    return session


def _header(runs: Runs) -> Header:
    """Which study it is: what its baseline trains, less seeds and tuned values."""
    file = runs.file
    bare = [*file.baseline.overrides, f"run_dir={file.folder / 'unbegun'}"]
    config = load_run(file.base, bare)
    return Header(study=key_of(config), corpora=fingerprints(runs.first.config))


@dataclass
class Session:
    """One call of `est-ds compare`."""

    file: StudyFile
    wish: Wish
    runs: Runs
    results: Results
    header: Header
    failed: dict[str, tuple[StudyRun, str]] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)
    _last_beat: float = field(default_factory=time.monotonic)

    def wanted(self, guess: bool = False) -> Wanted:
        """The runs of the study; with `guess` also those that wait for a grid."""
        return wanted_runs(self.runs, self._chooser(guess))

    def _chooser(self, guess: bool) -> Chooser:
        ratios = known_ratios(self.runs, self.results.times)
        return Chooser(self.results.losses, ratios, guess)

    def todo(self, guess: bool = False) -> list[StudyRun]:
        """The runs that are to be trained, the next one first."""
        wanted = wanted_runs(self.runs, self._chooser(guess), self.wish.only)
        return [
            run
            for run in wanted.runs
            if run.key not in self.results.runs and run.key not in self.failed
        ]

    @property
    def places(self) -> Places:
        return Places.on_this_machine(processes_of(self.runs.first), self.wish.jobs)

    def say(self, text: str) -> None:
        """Prints what is no answer."""
        print(text, file=sys.stderr if self.wish.json else sys.stdout, flush=True)

    def list_todo(self) -> Todo:
        """What is to be trained, and what it costs."""
        todo = self.todo(guess=True)
        return make_todo(self.runs, todo, self.results, self.places, self._done_so_far)

    @property
    def needs_times(self) -> bool:
        """Whether runs wait for step times that were not measured."""
        asked = "seconds" in self.file.study.budgets
        known = known_ratios(self.runs, self.results.times)
        return asked and not self.file.arms.keys() <= known.keys()

    def work(self) -> int:
        """Measures and trains what is not done; returns the exit code of `train`."""
        if self.wish.time_only or self.needs_times:
            self.measure()
        if self.wish.time_only:
            return 0
        if self.todo():
            self.say(todo_text(self.list_todo()))
        self.clear_finished()
        return self.train()

    def measure(self) -> None:
        """Measures the step times of all arms, while nothing trains.

        Raises:
            Failure: they could not be measured.
        """
        arms = len(self.file.arms)
        self.say(f"measuring step times of {arms} arms in turns, {LIMIT_S:.0f} s each and a start")
        log = self.file.folder / "times.log"
        with log.open("w") as f:
            try:
                times = measure(self.runs, self.places.processes, f)
            except Failure as e:
                raise Failure(f"{e} What the processes said: {log}") from None
        self.results.add_times(times)
        self.say(times_text(times))

    def train(self) -> int:
        """Trains what is not done; 0, or 1 if a run failed, or what a signal asks for."""
        watcher = Watcher(self.todo, self._done, self._failed, self._beat)
        with Signals() as signals:
            code = train_all(self.places, watcher, signals)
        if code:
            self.say("stopped; start it again to go on")
        return code or (1 if self.failed else 0)

    def _done(self, run: StudyRun, whole: bool) -> None:
        result = collect(run, self.runs.parameters(run), diverged=not whole)
        if (asked := self.file.study.evaluate) and result.loss is not None:
            try:
                result = result.model_copy(update={"tasks": scores_of(run, asked)})
            except UserError as e:
                self._failed(run, f"it is trained, and its tasks were not scored: {e}")
                return
        keep_windows(run, self.results.windows(run.key))
        self.results.add(result)
        if not self.file.study.keep_checkpoints:
            clear(run)
        said = "diverged" if result.loss is None else f"held-out loss {result.loss:.4f}"
        self.say(f"{self._count()} {run.name}: {said}{self._left()}")

    def _failed(self, run: StudyRun, why: str) -> None:
        self.failed[run.key] = (run, why)
        self.say(f"{self._count()} {run.name}: failed: {why}")

    def _count(self) -> str:
        done = self._done_so_far
        return f"[{done}/{done + len(self.todo(guess=True)) + len(self.failed)}]"

    @property
    def _done_so_far(self) -> int:
        """Runs of the study that are done, trained by this call or before."""
        return len(self.wanted(guess=True).by_key.keys() & self.results.runs.keys())

    def _left(self) -> str:
        """The time left."""
        begun = [r for r in self.running if r.run.key not in self.results.runs]
        keys = {r.run.key for r in begun}
        new = [run for run in self.todo(guess=True) if run.key not in keys]
        left_s = expected_s(new, self.results, begun=[(r.run, r.left) for r in begun])
        if not left_s:
            return ""
        return f"; about {clock(left_s / len(self.places.environments))} left"

    def _beat(self, running: list[Running]) -> None:
        self.running = list(running)
        if time.monotonic() - self._last_beat < BEAT_S:
            return
        self._last_beat = time.monotonic()
        under_way = [
            f"{r.run.name} step {steps_logged(Path(r.run.config.run_dir)):,} of {r.run.steps:,}"
            for r in running
        ]
        self.say(f"{self._count()} training {'; '.join(under_way)}")

    def clear_finished(self) -> None:
        """Removes what a killed call has left of runs whose results are on disk."""
        if not self.file.study.keep_checkpoints:
            for key, run in self.wanted().by_key.items():
                if key in self.results.runs:
                    clear(run)

    def answers(self) -> Answers:
        """What is known, whole or not."""
        return answer(self.runs, self.wanted(), self.results)

    def show(self) -> Answers:
        """Prints what is known, whole or not."""
        found = self.answers()
        if self.wish.json:
            print(answers_json(self.runs, found, self.results))
        else:
            print(answers_text(self.runs, found))
            for name, said in verdicts(found):
                print(f"{name}: {said}")
        for run, why in self.failed.values():
            self.say(f"failed: {run.name}: {why}")
        self.say(f"the page is {write_page(self.runs, found, self.results)}")
        if self.wish.plot:
            snapshot = Snapshot(self.runs, found, self.results)
            self.say(f"the picture is {write_study_figure(snapshot, Path(self.wish.plot))}")
        return found
