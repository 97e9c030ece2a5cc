"""The trackers that `log.to` may name: accelerate's, and what each of them needs besides."""

from __future__ import annotations

import logging
import os
import re
import secrets
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import est_ds
from est_ds.config.run_config import RunConfig
from est_ds.engine.events import hide_after
from est_ds.errors import UserError, how_to_install
from est_ds.plans.phases import Phase
from est_ds.ranks.versions import versions
from est_ds.run.directory import flat

PROJECT = "est_ds"
LIMIT_S = 30.0  # for what is still to be sent at the end
MLFLOW_STORE = "MLFLOW_TRACKING_URI"
# By which launchers tell a process its place.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LAUNCHED_TOO = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Tracker(ABC):
    """One of accelerate's trackers for one run. What is called after `__init__` is called from one
    thread.

    Attributes:
        name: in `log.to`, and of its extra.
        hides: whether it can hide points, so that what is trained anew is sent anew.
        in_rows: whether it takes all figures of an x at once.
        tracker: accelerate's, from `start` on.
        new_name: a name for a run that is new there.
        limit_s: how long it may take at the end, where the watchdog still looks.
    """

    name: str
    hides = False
    in_rows = False
    tracker: Any

    def __init__(self, config: RunConfig) -> None:
        self.directory = Path(config.run_dir).absolute()
        self.project = config.log.project
        self.limit_s = min(LIMIT_S, config.watchdog.limit_s / 2)
        # W&B takes no other characters.
        base = re.sub(r"[^\w-]", "-", self.directory.name, flags=re.ASCII)[:60]
        self.new_name = f"{base}-{secrets.token_hex(4)}"

    @classmethod
    def modules(cls) -> tuple[str, ...]:
        """Modules that must be there."""
        return (cls.name,)

    @abstractmethod
    def start(self, run: str | None, done: int) -> str:
        """Starts.

        Args:
            run: the name by which it knows the run; None if it does not yet.
            done: steps done.

        Returns:
            The name by which it knows the run from now on.
        """

    def sent(self, marked: dict[str, int]) -> dict[str, int]:
        """Returns the last x of each kind of points that it has: as marked, if it cannot be
        asked."""
        return marked

    def describe(self, about: dict[str, Any], is_new: bool) -> None:
        """Saves what there is to know of a run, which may be new there."""
        self.tracker.store_init_configuration(about)

    def log(self, figures: dict[str, float], done: int) -> None:
        """Sends figures of an x."""
        self.tracker.log(figures, step=done)

    def hide_after(self, done: int) -> None:
        """Hides the points after `done` steps; asked only of those that `hides`."""
        raise NotImplementedError

    def finish(self, ended_well: bool) -> None:
        """Sends what is left, and says how the run ended."""
        self.tracker.finish()

    def _begin(self, tracker: Any) -> None:
        tracker.main_process_only = False  # it is made on rank 0 alone
        tracker.start()
        self.tracker = tracker


class TensorBoard(Tracker):
    """Its files are in `tensorboard/` of the run directory."""

    name = "tensorboard"
    hides = True

    def start(self, run: str | None, done: int) -> str:
        from accelerate.tracking import TensorBoardTracker

        kept = 0 if run is None else done  # an earlier version may have written
        self._begin(TensorBoardTracker(self.name, self.directory, purge_step=kept + 1))
        return self.name

    def describe(self, about: dict[str, Any], is_new: bool) -> None:
        if is_new:  # accelerate would add two folders at every start
            text = "\n".join(f"    {name}: {value}" for name, value in about.items())
            self.tracker.writer.add_text("config", text, 0)

    def hide_after(self, done: int) -> None:
        hide_after(self.tracker.writer.file_writer, done)


class Wandb(Tracker):
    """Its files are in `wandb/` of the run directory. It keeps a row to itself, where a kill loses
    it, until it is told that it is whole; from then on it takes no more of that x."""

    name = "wandb"
    in_rows = True

    def start(self, run: str | None, done: int) -> str:
        import wandb
        from accelerate.tracking import WandBTracker

        run = run or self.new_name
        settings = wandb.Settings(silent=True, console="off", finish_timeout=self.limit_s)
        mode = wandb.setup(settings).settings.mode
        # It would ask a terminal for a key, though nobody may sit there.
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key: run wandb login, or set WANDB_MODE=offline")
        project = self.project or os.environ.get("WANDB_PROJECT", PROJECT)
        given = {"id": run, "name": os.environ.get("WANDB_NAME", run), "resume": "allow"}
        self._begin(WandBTracker(project, dir=self.directory, settings=settings, **given))
        return run

    def log(self, figures: dict[str, float], done: int) -> None:
        self.tracker.log(figures, step=done, commit=True)

    def finish(self, ended_well: bool) -> None:
        self.tracker.run.finish(exit_code=0 if ended_well else 1)


class Mlflow(Tracker):
    """Without MLFLOW_TRACKING_URI it writes `mlflow.db` in the run directory."""

    name = "mlflow"

    @classmethod
    def modules(cls) -> tuple[str, ...]:
        return ("mlflow",) if MLFLOW_STORE in os.environ else ("mlflow", "sqlalchemy", "alembic")

    def start(self, run: str | None, done: int) -> str:
        import mlflow
        from accelerate.tracking import MLflowTracker

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        artifacts = None
        if MLFLOW_STORE not in os.environ:
            mlflow.set_tracking_uri(_sqlite(_whole_database(self.directory / "mlflow.db")))
            artifacts = (self.directory / "mlruns").as_uri()
        tracker = MLflowTracker(PROJECT, logging_dir=artifacts, run_name=self.new_name)
        # The variables of MLflow have the last word in accelerate.
        tracker.experiment_name = self.project or tracker.experiment_name
        tracker.run_id = run or tracker.run_id
        self._begin(tracker)
        return tracker.tracker.info.run_id

    def sent(self, marked: dict[str, int]) -> dict[str, int]:
        from mlflow import MlflowClient

        client, run, found = MlflowClient(), self.tracker.tracker.info.run_id, {}
        for kind in marked:
            figure = "full_loss" if kind.startswith("boundary") else "loss"
            if points := client.get_metric_history(run, f"{kind}/{figure}"):
                found[kind] = max(point.step for point in points)
        return found

    def describe(self, about: dict[str, Any], is_new: bool) -> None:
        import mlflow

        if is_new:  # a parameter cannot change there, but a tag can
            super().describe(about, is_new)
        for name in ("git_revision", "versions.est_ds"):
            if name in about:
                mlflow.set_tag(name, about[name])

    def finish(self, ended_well: bool) -> None:
        import mlflow

        mlflow.end_run("FINISHED" if ended_well else "FAILED")


def _whole_database(file: Path) -> Path:
    """Makes MLflow's database where there is none. It takes many statements, and one that a kill
    has left half made can never be opened."""
    if not file.exists():
        from mlflow import MlflowClient

        beside = file.with_suffix(".partial")
        beside.unlink(missing_ok=True)
        MlflowClient(_sqlite(beside)).search_experiments()
        os.replace(beside, file)
    return file


def _sqlite(file: Path) -> str:
    return f"sqlite:///{file}"


class Trackio(Tracker):
    """Its files are in TRACKIO_DIR; with TRACKIO_SPACE_ID they go to a Hugging Face Space. Of files
    that cannot be written it warns by itself, and goes on without them."""

    name = "trackio"

    def start(self, run: str | None, done: int) -> str:
        from accelerate.tracking import TrackioTracker
        from trackio.utils import TRACKIO_DIR

        if not any(map(os.environ.get, ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))):
            TRACKIO_DIR.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=TRACKIO_DIR).close()
        run = run or self.new_name
        self._begin(TrackioTracker(self.project or PROJECT, name=run, resume="allow", embed=False))
        return run


KINDS: dict[str, type[Tracker]] = {k.name: k for k in (TensorBoard, Wandb, Mlflow, Trackio)}


def check_trackers(config: RunConfig) -> None:
    """Refuses trackers whose packages are not here.

    Raises:
        UserError: one is missing.
    """
    for name in config.log.to:
        for module in KINDS[name].modules():
            if find_spec(module) is None:
                raise UserError(
                    f"log.to={name}: the package {module!r} is not installed here; install it "
                    f"({how_to_install(name)}), or take {name} out of log.to."
                )


def make_trackers(config: RunConfig) -> list[Tracker]:
    """Returns the trackers of `log.to`, none of them started."""
    if config.log.to:
        _let_accelerate_log()
    return [KINDS[name](config) for name in config.log.to]


def _let_accelerate_log() -> None:
    """Gives accelerate the state without which its trackers raise: that of a process alone. From a
    launcher's variables it would set devices and threads, which are not its to set."""
    from accelerate import PartialState

    hidden = {n: os.environ.pop(n) for n in (*LAUNCHED, *LAUNCHED_TOO) if n in os.environ}
    try:
        PartialState(cpu=True)
    finally:
        os.environ.update(hidden)


def describe_run(config: RunConfig, phases: Sequence[Phase]) -> dict[str, Any]:
    """Returns what trackers keep of a run beside its figures: the config by dotted names, the
    phases, the versions, and the git revision of est_ds where it is a checkout."""
    found = flat(config.model_dump(mode="json", by_alias=True))
    for i, phase in enumerate(phases):
        found[f"phases.{i}"] = f"{phase.name}: steps {phase.from_step + 1}-{phase.until_step}"
    found |= {f"versions.{name}": version for name, version in versions().items()}
    if revision := git_revision(Path(est_ds.__file__)):
        found["git_revision"] = revision
    return found


def git_revision(file: Path) -> str | None:
    """Returns the commit of a file's repository, with `-dirty` if anything in it was altered; None
    if git does not know the file."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(file.parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
