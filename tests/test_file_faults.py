"""Files that fail under a run: a clear end of all processes, and the last checkpoint resumes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import fork_ranks, refused
from est_ds.checkpoints.index import FILE as INDEX
from est_ds.checkpoints.index import Index
from est_ds.checkpoints.reader import damage
from est_ds.checkpoints.state import State
from est_ds.checkpoints.store import BEST, LATEST, Store
from est_ds.config.sections import Checkpoint as Settings
from est_ds.data.indexed import Corpus
from est_ds.errors import LocalFailure
from est_ds.run.metrics import FILE, MetricsFile, read_metrics
from namespaces import Started, kill_all, wait_until

slow = pytest.mark.slow
SETTINGS = [
    "steps=2000", "model.num_hidden_layers=2", "method={name: full}", "batch={global: 4, micro: 2}",
    "parallel={pipe: 1, zero: 1, processes: 2}", "checkpoint={every: 5, keep_last: 2}",
    "evaluate={every: 10, sequences: 8}",
]  # fmt: skip


@pytest.fixture
def folder(synthetic_run, tmp_path) -> Path:
    """With a copy of the run file's corpora."""
    for file in synthetic_run.parent.glob("*.*"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of its own that becomes read-only on its first error, as disks do."""
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4", path="/sbin:/usr/sbin"):
        pytest.skip("needs root and mkfs.ext4: a disk is a file in a loop device")
    image, where = tmp_path / "image", tmp_path / "disk"
    where.mkdir()
    with image.open("wb") as f:
        f.truncate(64 << 20)
    subprocess.run(["/sbin/mkfs.ext4", "-q", image], check=True)
    mounted = subprocess.run(mounting(image, where), capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"loop devices are not allowed here: {mounted.stderr.strip()}")
    yield where
    unmount(where)


def mounting(image: Path, where: Path) -> list[str]:
    return ["mount", "-o", "loop,errors=remount-ro", str(image), str(where)]


def unmount(disk: Path) -> None:
    """Once the processes that were killed have let go of it."""
    command = ["umount", str(disk)]
    wait_until(lambda: subprocess.run(command, capture_output=True).returncode == 0, 30)


def device(disk: Path) -> str:
    found = subprocess.run(["findmnt", "-no", "SOURCE", disk], capture_output=True, text=True)
    return Path(found.stdout.strip()).name


def arguments(folder: Path, run_dir: Path) -> tuple[str, ...]:
    corpora = [f"data.{name}={folder / name}" for name in ("train", "valid", "tokenizer")]
    corpora[-1] = f"data.tokenizer={folder}"
    return str(folder / "run.yaml"), f"run_dir={run_dir}", *corpora, *SETTINGS


def begin(folder: Path, run_dir: Path, *overrides: str) -> Started:
    command = [sys.executable, "-m", "est_ds.cli", "train", *arguments(folder, run_dir), *overrides]
    log = folder / f"log-{time.monotonic_ns()}"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    return Started(process, log)


@contextmanager
def trained(folder: Path, run_dir: Path, *overrides: str) -> Iterator[Started]:
    """A run with a checkpoint and steps after it, still training; killed at the end."""
    job = begin(folder, run_dir, *overrides)
    store = Store(run_dir / "checkpoints")

    def under_way() -> bool:
        assert job.process.poll() is None, job.text
        return (store.named(LATEST) or 0) >= 10

    try:
        wait_until(under_way, 180, every_s=0.02)
        yield job
    finally:
        kill_all(job.process, run_dir)


def check_end(job: Started, *named: str, within_s: float = 60.0) -> None:
    """The run ends by itself: exit code 1, one complaint, which names all this, no traceback."""
    began = time.monotonic()
    assert job.wait(within_s) == 1, job.text
    print(f"all ended after {time.monotonic() - began:.1f} s:\n{job.text.partition('failed')[2]}")
    assert job.text.count("est-ds: failed: ") == 1 and "Traceback" not in job.text, job.text
    said = job.text.partition("est-ds: failed: ")[2]
    for text in (*named, "start the run again"):
        assert text in said, said


def check_goes_on(folder: Path, run_dir: Path) -> None:
    """Its last checkpoint is whole, and the run goes on from there."""
    store = Store(run_dir / "checkpoints")
    last = store.named(LATEST)
    assert damage(store.path(last)) is None
    log = folder / "goes_on"
    ranks = fork_ranks(arguments(folder, run_dir), 2, (log, log))
    try:
        wait_until(lambda: log.exists() and f"step {last + 1}/" in log.read_text(), 180)
        assert f"resuming at step {last} of" in log.read_text()
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


@contextmanager
def gone(file: Path) -> Iterator[None]:
    aside = file.rename(file.with_name("aside"))
    yield
    aside.rename(file)


@contextmanager
def truncated(file: Path) -> Iterator[None]:
    content = file.read_bytes()
    os.truncate(file, 0)
    yield
    file.write_bytes(content)


@contextmanager
def replaced(file: Path) -> Iterator[None]:
    other = shutil.copy(file, file.with_name("other"))
    os.replace(other, file)
    yield


@contextmanager
def link_to_nowhere(file: Path) -> Iterator[None]:
    with gone(file):
        file.symlink_to("nowhere")
        yield
        file.unlink()


@contextmanager
def another_folder(file: Path) -> Iterator[None]:
    """As where its file system is unmounted, and its mount point remains."""
    with gone(file):
        file.mkdir()
        yield
        shutil.rmtree(file)


UNREADABLE = "cannot be read any more (No such file or directory)"
LOST = "could not write the checkpoint in"
FAULTS = {
    "corpus deleted": (gone, "train.bin", [UNREADABLE], slow),
    "corpus truncated": (truncated, "train.bin", ["was changed or replaced", "rank "], ()),
    "corpus replaced": (replaced, "train.bin", ["was changed or replaced"], slow),
    "held-out corpus deleted": (gone, "valid.bin", [UNREADABLE], slow),
    "checkpoints moved away": (gone, "run/checkpoints", [LOST, "No such file"], slow),
    "checkpoints a link to nowhere": (
        link_to_nowhere, "run/checkpoints", [LOST, "No such file"], slow,
    ),
    "checkpoints unmounted": (another_folder, "run/checkpoints", [LOST, "another folder"], slow),
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(n, marks=f[3]) for n, f in FAULTS.items()])
def test_file_that_vanishes_ends_the_run_and_its_checkpoint_stays(case, folder):
    fault, name, named, _ = FAULTS[case]
    with trained(folder, folder / "run") as job, fault(folder / name):
        check_end(job, str(folder / name), *named)
    check_goes_on(folder, folder / "run")


@slow
def test_disk_that_becomes_read_only_ends_the_run_and_its_checkpoint_stays(disk, folder):
    run_dir = disk / "run"
    with trained(folder, run_dir) as job:
        Path("/sys/fs/ext4", device(disk), "trigger_fs_error").write_text("1")
        check_end(job, str(run_dir), "Read-only file system")
    unmount(disk)
    # A copy: another mount namespace may still hold the disk as it is.
    mended = shutil.copy(folder / "image", folder / "mended")
    subprocess.run(["/sbin/e2fsck", "-y", mended], capture_output=True)
    subprocess.run(mounting(mended, disk), check=True)
    check_goes_on(folder, run_dir)


@slow
def test_store_that_hangs_ends_the_run_and_the_line_that_waits_is_named(folder):
    """A pipe that nobody reads blocks who opens it, as a dead file server does."""
    run_dir = folder / "run"
    with trained(folder, run_dir, "watchdog.limit_s=20") as job:
        os.mkfifo(run_dir / "checkpoints" / ".latest.partial")
        named = ["rank 0 on ", "is held up at est_ds/disk.py:", "(replace_bytes)"]
        check_end(job, "no progress for 20 s", *named)
    check_goes_on(folder, run_dir)


@slow
def test_frozen_disk_ends_the_run_when_it_thaws_and_the_line_that_waits_is_named(disk, folder):
    """Linux ends no process that waits for a frozen disk: what was wrong is said before."""
    run_dir = disk / "run"
    with trained(folder, run_dir, "watchdog.limit_s=20") as job:
        subprocess.run(["fsfreeze", "-f", disk], check=True)
        try:
            wait_until(lambda: "is held up at" in job.text, 60)
        finally:
            subprocess.run(["fsfreeze", "-u", disk], check=True)
        check_end(job, "no progress for 20 s", "rank 0 on ")
    check_goes_on(folder, run_dir)


@pytest.mark.parametrize("what", ["run directory", "its parent", "its checkpoints"])
def test_read_only_run_directory_is_an_error_at_the_start(what, disk, tiny_run, tmp_path, capsys):
    run_dir = disk / "runs" / "run"
    made = run_dir if what == "run directory" else run_dir.parent
    made.mkdir(parents=True)
    if what == "its checkpoints":
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        (run_dir / "checkpoints").symlink_to(made)
        (run_dir / "config.yaml").write_text(tiny_run.read_text())
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    error = refused(capsys, "train", tiny_run, f"run_dir={run_dir}")
    assert f"run_dir={str(run_dir)!r}" in error and "Read-only file system" in error
    assert ("checkpoints" in error) == (what == "its checkpoints")


def test_checkpoints_folder_that_is_a_link_to_nowhere_is_an_error(tiny_run, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(tiny_run.read_text())
    (tmp_path / "checkpoints").symlink_to("nowhere")
    error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path}")
    assert str(tmp_path / "checkpoints") in error and "No such file" in error


@pytest.mark.parametrize("steps, there", [(1, False), (11, True)])
def test_run_whose_checkpoints_are_elsewhere_does_not_begin_anew(
    steps, there, tiny_run, tmp_path, capsys
):
    (tmp_path / "config.yaml").write_text(tiny_run.read_text())
    lines = "".join(json.dumps({"step": step, "loss": 6.0}) + "\n" for step in range(steps))
    (tmp_path / FILE).write_text(lines)
    if there:  # an empty mount point
        (tmp_path / "checkpoints").mkdir()
    error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path}")
    assert f"has trained {steps} steps" in error and "holds no checkpoint" in error
    assert (tmp_path / FILE).read_text() == lines


def test_start_killed_before_it_had_a_config_does_not_block_the_directory(tiny_run, tmp_path):
    from est_ds.config.run_file import load_run
    from est_ds.run.directory import check_run_dir

    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.partial").write_text("run_d")
    check_run_dir(load_run(tiny_run, [f"run_dir={tmp_path}"]))


def test_config_of_a_run_directory_that_is_no_yaml_is_an_error(tiny_run, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("steps: [1, 2")
    error = refused(capsys, "train", tiny_run, f"run_dir={tmp_path}")
    assert str(tmp_path / "config.yaml") in error and "not YAML" in error


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("fault", [gone, truncated, replaced])
def test_corpus_notices_what_happened_to_its_files_before_it_reads_them(fault, ending, folder):
    corpus = Corpus.open(folder / "train")
    corpus.check_unchanged()
    corpus.window(0, 10)
    corpus.check_unchanged()
    with fault(folder / f"train.{ending}"):
        with pytest.raises(LocalFailure, match=f"train.{ending}"):
            corpus.check_unchanged()


def test_corpus_changed_before_it_was_first_read_is_not_mapped(folder):
    corpus = Corpus.open(folder / "train")
    with truncated(folder / "train.bin"), pytest.raises(LocalFailure, match="train.bin"):
        corpus.window(0, 10)


def test_loss_that_is_no_number_is_valid_json_in_the_metrics(tmp_path):
    metrics = MetricsFile(tmp_path, 0, {})
    metrics.write(step=0, eval_loss=math.nan, eval_losses={"a": math.inf, "b": 1.5})
    metrics.close()

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)
    assert line == {"step": 0, "eval_loss": None, "eval_losses": {"a": None, "b": 1.5}}
    assert read_metrics(tmp_path)[1] == [line]


def test_checkpoint_whose_held_out_loss_is_no_number_is_never_the_best(tmp_path):
    store = Store(tmp_path)
    state = State(config={}, versions={}, corpus="", held_out={}, tokens=0, next=None)
    for step, loss in ((1, 3.0), (2, math.nan), (3, 2.0), (4, -math.inf)):
        store.path(step).mkdir()
        index = Index(step=step, layout={}, parameters={}, files={}, state=state, eval_loss=loss)
        assert "NaN" not in index.to_json() and "Infinity" not in index.to_json()
        (store.path(step) / INDEX).write_text(index.to_json())
    store.keep(4, Settings(every=1, keep_last=1))
    assert store.named(BEST) == 3 and store.steps() == [3, 4]


def test_an_output_without_room_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "est_ds.cli", "fields"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    expected = "est-ds: failed: [Errno 28] No space left on device\n"
    assert (done.returncode, done.stderr) == (1, expected)
