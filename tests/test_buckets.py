"""Checkpoints are copied to a bucket while a run trains, and a run goes on from there."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch.distributed as dist

from buckets import BUCKET, SECRET, Way, credentials, gcs_server, s3_server
from cases.tiny import make_config
from conftest import ROOT, fork_ranks, refused, train
from est_ds.checkpoints import copier as copier_file
from est_ds.checkpoints.bucket import Bucket
from est_ds.checkpoints.copier import Copier, CopyBoard
from est_ds.checkpoints.index import FILE, read_index
from est_ds.checkpoints.reader import damage
from est_ds.checkpoints.restore import _check_same_run, choose_or_restore
from est_ds.checkpoints.store import Store, tag_of
from est_ds.config.run_file import load_run
from est_ds.config.sections import Checkpoint as Settings
from est_ds.data.manifest import read_manifest
from est_ds.data.remote import Remote, RemoteError
from est_ds.disk import describe
from est_ds.errors import UserError, without_keys
from est_ds.ranks import gather, meeting
from est_ds.run.directory import check_run_dir
from est_ds.run.metrics import read_metrics
from est_ds.studies.runs import Runs
from est_ds.studies.study_file import load_study
from forks import fork, wait

SHORT = ("method.name=full", "steps=4", "schedule.warmup=1", "evaluate.every=4")
FAULTS = ["full", *(pytest.param(f, marks=pytest.mark.slow) for f in ("cut", "forbidden"))]
KEEP_2 = "checkpoint={every: 2, keep_last: 0, keep_best: false}"


@pytest.fixture(scope="session")
def s3(tmp_path_factory) -> Iterator[int]:
    """A server with a bucket; its port."""
    with s3_server(tmp_path_factory.mktemp("s3") / "log.txt") as port:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in credentials(port).items():
                patch.setenv(name, value)
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
        yield port


@pytest.fixture
def way(s3, monkeypatch) -> Iterator[Way]:
    """The environment of the server, by way of a proxy with faults."""
    way = Way(s3)
    with way.open() as port:
        for name, value in credentials(port).items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield way


@pytest.fixture(scope="module")
def copied(tiny_run, tmp_path_factory) -> tuple[Path, Path, str]:
    """A finished run of two processes, its copies, and what it said."""
    folder = tmp_path_factory.mktemp("copied")
    run, there = folder / "run", folder / "bucket"
    overrides = (*SHORT, KEEP_2, f"checkpoint.copy_to=file://{there}")
    done = train(tiny_run, f"run_dir={run}", *overrides, processes=2)
    assert done.returncode == 0, done.stderr
    return run, there, done.stdout


@pytest.fixture
def alone(tmp_path) -> Iterator[dist.Store]:
    """A group of this process alone, and a store."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.HashStore()
    dist.destroy_process_group()


def copier_of(store: Store, settings: Settings, board_store: dist.Store, notes: list) -> Copier:
    board = CopyBoard(lambda: board_store, "test")
    return Copier(store, settings, board, notes.append, lambda: None)


def copies_to(url: str, **more) -> Settings:
    return Settings(every=2, keep_last=1, keep_best=False, copy_to=url, **more)


def fetched(bucket: Bucket, step: int, folder: Path) -> Path:
    """A copy of a copy on this machine, every file of which is checked."""
    target = folder / tag_of(step)
    target.mkdir(parents=True)
    index = bucket.index(step)
    for name, file in index.files.items():
        bucket.fetch(f"{target.name}/{name}", target / name, file, lambda _: None)
    (target / FILE).write_text(index.to_json())
    assert damage(target) is None
    return target


# Runs


def test_every_checkpoint_of_a_run_has_a_whole_copy(copied):
    run, there, said = copied
    for step in (2, 4):
        assert damage(there / tag_of(step)) is None
        assert read_index(there / tag_of(step)) == read_index(Store.of(run).path(step))
        assert f"checkpoint {step} copied to file://{there}" in said
    assert (there / tag_of(4) / "metrics.jsonl").is_file()


def test_run_on_an_empty_disk_goes_on_from_its_copy_in_another_layout(copied, tiny_run, tmp_path):
    run, there, _ = copied
    bucket, new = tmp_path / "bucket", tmp_path / "run"
    shutil.copytree(there, bucket)
    # As a process leaves it that is killed while it copies.
    (bucket / tag_of(4) / FILE).unlink()
    overrides = (*SHORT, KEEP_2, f"checkpoint.copy_to=file://{bucket}", "parallel.pipe=1")
    done = train(tiny_run, f"run_dir={new}", *overrides, processes=1)
    assert done.returncode == 0, done.stderr
    assert "checkpoint 2 fetched from file://" in done.stdout
    assert "resuming at step 2 of 4" in done.stdout
    (steps, evaluations), (expected, held_out) = read_metrics(new), read_metrics(run)
    assert [e["step"] for e in steps] == [0, 1, 2, 3]
    assert [e["loss"] for e in steps] == pytest.approx([e["loss"] for e in expected], rel=1e-5)
    assert evaluations[0]["eval_loss"] == pytest.approx(held_out[0]["eval_loss"], rel=1e-5)
    # By one process now: no file of the former two is left.
    assert damage(bucket / tag_of(4)) is None
    names = {file.name for file in (bucket / tag_of(4)).glob("rank_*")}
    assert names == {"rank_00000.safetensors"}


def test_bucket_of_another_run_is_refused(copied, tiny_run, tmp_path):
    _, there, _ = copied
    overrides = (*SHORT, KEEP_2, f"checkpoint.copy_to=file://{there}", "optimizer.lr=0.1")
    overrides += ("parallel.pipe=1",)
    done = train(tiny_run, f"run_dir={tmp_path / 'run'}", *overrides, processes=1)
    assert done.returncode == 2
    assert "checkpoint.copy_to=" in done.stderr and "optimizer.lr is 0.003 there" in done.stderr


@pytest.mark.slow
def test_run_does_not_begin_anew_when_its_bucket_cannot_be_read(copied, tiny_run, tmp_path):
    """As when rights are wrong, and nothing is on the disk."""
    overrides = (*SHORT, KEEP_2, "checkpoint.copy_to=s3://none/run", "parallel.pipe=1")
    keys = credentials(1)  # nobody listens there
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        done = train(tiny_run, f"run_dir={tmp_path / 'run'}", *overrides, processes=1)
    assert done.returncode == 1
    assert "s3://none/run: could not list it" in done.stderr and "Traceback" not in done.stderr
    assert SECRET not in done.stderr + done.stdout
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_run_whose_bucket_takes_nothing_trains_to_its_end(way, copied, tiny_run, tmp_path):
    way.fault = "forbidden"
    overrides = (*SHORT, KEEP_2, f"checkpoint.copy_to=s3://{BUCKET}/refused", "parallel.pipe=1")
    wait_1 = "checkpoint.copy_wait_s=1"
    done = train(tiny_run, f"run_dir={tmp_path / 'run'}", *overrides, wait_1, processes=1)
    assert done.returncode == 0, done.stderr
    assert "warning: checkpoint 2 could not be copied (" in done.stdout
    assert "PermissionError: Access Denied" in done.stdout and SECRET not in done.stdout
    assert "checkpoint 4 could not be copied within 1 s (checkpoint.copy_wait_s)" in done.stdout
    assert Store.of(tmp_path / "run").latest == 4
    assert [e["loss"] for e in read_metrics(tmp_path / "run")[0]] == pytest.approx(
        [e["loss"] for e in read_metrics(copied[0])[0]], rel=1e-5
    )


@pytest.mark.slow
def test_run_that_requires_copies_ends_without_them(way, tiny_run, tmp_path):
    way.fault = "full"
    overrides = (*SHORT, KEEP_2, f"checkpoint.copy_to=s3://{BUCKET}/required", "parallel.pipe=1")
    more = ("checkpoint.copy_required=true", "checkpoint.copy_wait_s=1")
    done = train(tiny_run, f"run_dir={tmp_path / 'run'}", *overrides, *more, processes=1)
    assert done.returncode == 1
    assert "est-ds: failed: checkpoint 2 could not be copied within 1 s" in done.stderr
    assert "checkpoint.copy_required=true" in done.stderr and "Traceback" not in done.stderr
    assert Store.of(tmp_path / "run").latest == 2


@pytest.mark.slow
def test_notice_waits_for_the_last_copy(way, tiny_run, tmp_path):
    way.slow_s = 0.3
    run = tmp_path / "run"
    run.mkdir()
    overrides = (*SHORT, "steps=5000", "checkpoint.every=5000", "parallel.pipe=1")
    more = (f"checkpoint.copy_to=s3://{BUCKET}/notice", "log.step_times=false")
    streams = tmp_path / "out", tmp_path / "err"
    [rank] = fork_ranks((tiny_run, f"run_dir={run}", *overrides, *more), 1, streams)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)[0]) < 2:
        assert time.monotonic() < deadline and rank.is_alive(), streams[1].read_text()
        time.sleep(0.1)
    os.kill(rank.pid, signal.SIGTERM)
    assert wait([rank], 120) == [75], streams[1].read_text()
    latest = Store.of(run).latest
    bucket = Bucket(f"s3://{BUCKET}/notice")
    assert bucket.newest() == read_index(Store.of(run).path(latest))
    fetched(bucket, latest, tmp_path)


def test_branch_takes_no_copies_of_its_parents_for_its_own(copied, capsys, tmp_path):
    arguments = ("branch", copied[0], "--at", "2", "--run-dir", tmp_path / "branch", "steps=8")
    assert "give the branch a folder of its own" in refused(capsys, *arguments)
    assert not (tmp_path / "branch").exists()


class Killed(BaseException):
    """Ends a start in its midst."""


def kill(*arguments, **more) -> None:
    raise Killed


@pytest.fixture
def met(alone, monkeypatch) -> None:
    """This process alone has met itself."""
    monkeypatch.setattr(meeting, "_stores", [alone])
    monkeypatch.setattr(gather, "_exchanges", [])


@pytest.mark.parametrize(
    "place", ["_make_room", "Bucket.fetch", "replace_bytes", "replace_text", "Store.point_to"]
)
def test_start_on_an_empty_disk_killed_while_it_fetches_is_started_again(
    place, copied, met, tiny_run, tmp_path, monkeypatch
):
    overrides = [*SHORT, KEEP_2, f"checkpoint.copy_to=file://{copied[1]}"]
    config = load_run(tiny_run, [f"run_dir={tmp_path / 'run'}", *overrides])
    store = Store.of(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"est_ds.checkpoints.restore.{place}", kill)
        choose_or_restore(store, config, lambda: None)
    check_run_dir(config)  # as every start does
    assert choose_or_restore(store, config, lambda: None).step == 4
    assert store.steps() == [4] and damage(store.path(4)) is None


def test_copies_of_another_micro_batch_say_which_where_it_is_a_part_of_the_run():
    given = {"method": {"name": "full", "draw": "micro_batch"}}
    size = {"global": 8}
    there, here = (make_config(batch=size | {"micro": n}, **given) for n in (4, 2))
    copy = SimpleNamespace(state=SimpleNamespace(config=there.model_dump(by_alias=True)))
    _check_same_run(copy, there)
    with pytest.raises(UserError, match="batch.micro is 4 there and 2 .* batch.micro=4 of the cop"):
        _check_same_run(copy, here)


def test_runs_of_a_study_have_copies_apart(write_study):
    study = write_study(set={"steps": 8, "checkpoint": {"every": 4, "copy_to": "file:///there"}})
    runs = Runs(load_study(study))
    assert runs.run("layers", 1, ()).config.checkpoint.copy_to == "file:///there/layers/seed_1"


# Copies alone


@pytest.mark.parametrize(
    "fault", ["full", *(pytest.param(f, marks=pytest.mark.slow) for f in ("cut", "forbidden"))]
)
def test_copy_is_tried_again_until_the_bucket_takes_it(
    fault, way, alone, copied, tmp_path, monkeypatch
):
    monkeypatch.setattr(copier_file, "FIRST_WAIT_S", 0.2)
    shutil.copytree(copied[0] / "checkpoints", tmp_path / "run" / "checkpoints")
    store, notes = Store.of(tmp_path / "run"), []
    bucket = Bucket(f"s3://{BUCKET}/{fault}")
    way.fault = fault
    with copier_of(store, copies_to(bucket.url), alone, notes) as copier:
        deadline = time.monotonic() + 60
        while not notes and time.monotonic() < deadline:
            time.sleep(0.05)
        assert notes and notes[0].startswith("warning: checkpoint 4 could not be copied"), notes
        assert bucket.newest() is None
        way.fault = None
        assert copier.settle() is None
    assert notes[-1].startswith("checkpoint 4 copied to s3://")
    assert SECRET not in "".join(notes)
    fetched(bucket, 4, tmp_path)


def test_newer_checkpoint_takes_the_place_of_one_that_waits(way, alone, copied, tmp_path):
    shutil.copytree(copied[0] / "checkpoints", tmp_path / "run" / "checkpoints")
    store, notes, bucket = Store.of(tmp_path / "run"), [], Bucket(f"s3://{BUCKET}/newer")
    way.slow_s = 0.3
    with copier_of(store, copies_to(bucket.url), alone, notes) as copier:
        while copier.held != {4}:  # which no run has copied
            time.sleep(0.01)
        copier.offer(2)
        assert copier.held == {2, 4}
        store.keep(4, copies_to(bucket.url), copier.held)
        assert store.steps() == [2, 4]
        copier.offer(4)
        assert copier.held == {4}
        copier.close()
        assert [note.split()[1] for note in notes] == ["4"]
    assert bucket.steps() == [4] and store.steps() == [4]


def test_answers_of_many_ranks_are_asked_for_in_few_requests(alone, monkeypatch):
    monkeypatch.setattr(copier_file, "AT_ONCE", 2)
    boards = [CopyBoard(lambda: alone, "many") for _ in range(5)]
    for rank, board in enumerate(boards):
        board.rank, board.num_ranks = rank, 5
    for number in (1, 2):
        boards[0].order(number, 10 * number)
        assert boards[4].ordered() == (number, 10 * number)
        for rank in (4, 0, 1, 3, 2):
            assert boards[0].answers(number) is None
            boards[rank].answer(number, "" if rank else "full")
        assert boards[0].answers(number) == ["full", "", "", "", ""]
    assert alone.num_keys() == 1  # the order


def test_file_of_many_requests_arrives_whole_or_not_at_all(way, tmp_path, monkeypatch):
    monkeypatch.setattr("est_ds.data.remote.BLOCK_BYTES", 5 << 20)
    file = tmp_path / "large"
    file.write_bytes(random.Random(0).randbytes(12 << 20))
    remote = Remote(f"s3://{BUCKET}/large", "field")

    def cut_later() -> None:
        if way.counts.get("PUT", 0) == 1:
            way.fault = "full"

    with pytest.raises(RemoteError, match=r"could not write a \(.*There is no room left"):
        remote.send(file, "a", cut_later)
    way.fault = None
    assert remote.sizes() == {}
    assert remote.send(file, "a", lambda: None) == describe(file)
    assert remote.sizes() == {"a": 12 << 20}
    # What a killed process has fetched is not fetched again.
    (tmp_path / ".back.partial").write_bytes(file.read_bytes()[: 7 << 20])
    seen: list[int] = []
    remote.fetch("a", tmp_path / "back", describe(file), seen.append)
    assert seen == [7 << 20] and describe(tmp_path / "back") == describe(file)
    with pytest.raises(RemoteError, match="is not what was written"):
        wrong = describe(file).model_copy(update={"sha256": "0" * 64})
        remote.fetch("a", tmp_path / "again", wrong, lambda _: None)
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_copies_in_google_cloud_storage(copied, alone, tmp_path, monkeypatch):
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    shutil.copytree(copied[0] / "checkpoints", tmp_path / "run" / "checkpoints")
    store, notes = Store.of(tmp_path / "run"), []
    with gcs_server(tmp_path / "log.txt") as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        bucket = Bucket(f"gs://{BUCKET}/run")
        with copier_of(store, copies_to(bucket.url), alone, notes) as copier:
            assert copier.settle() is None, notes
            make_checkpoint(store, 6)
            copier.offer(6)
            assert copier.settle() is None, notes
        assert bucket.steps() == [6]
        fetched(bucket, 6, tmp_path)


def make_checkpoint(store: Store, step: int) -> None:
    """A checkpoint with the files of another."""
    source = store.path(4)
    shutil.copytree(source, store.path(step))
    index = read_index(source).model_copy(update={"step": step})
    (store.path(step) / FILE).write_text(index.to_json())
    store.point_to(step)


def copy_latest(run: str, url: str) -> None:
    """In a process of its own: copies what no run has copied, and says when it begins."""
    store = dist.FileStore(f"{run}/group-{os.getpid()}", 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with copier_of(Store.of(run), copies_to(url), dist.HashStore(), []) as copier:
        Path(run, "began").touch()
        copier.settle()
    os._exit(0)


@pytest.mark.slow
def test_copying_killed_twenty_times_always_leaves_a_whole_copy(way, copied, tmp_path):
    run, draw, caught = tmp_path / "run", random.Random(0), 0
    shutil.copytree(copied[0] / "checkpoints", run / "checkpoints")
    store, bucket = Store.of(run), Bucket(f"s3://{BUCKET}/killed")
    way.slow_s = 0.2
    streams = tmp_path / "out", tmp_path / "err"
    for i in range(22):
        before = bucket.newest()
        make_checkpoint(store, 6 + i)
        (run / "began").unlink(missing_ok=True)
        process = fork(copy_latest, (str(run), bucket.url), streams, ROOT, dict(os.environ))
        while not (run / "began").exists():
            assert process.is_alive(), streams[1].read_text()
            time.sleep(0.01)
        if i % 21:  # the first and the last one may do their work
            time.sleep(draw.uniform(0.0, 3.0))
            os.kill(process.pid, signal.SIGKILL)
        wait([process], 60)
        now = bucket.newest()
        assert now.step in (6 + i, *([before.step] if before else []))
        fetched(bucket, now.step, tmp_path / str(i))
        caught += now.step < 6 + i
    assert caught > 5
    assert bucket.steps() == [27]


def put(corpus: Path, url: str) -> None:
    """Puts the corpora and their tokenizer into a bucket."""
    remote = Remote(url, "field")
    for file in (*corpus.glob("train.*"), *corpus.glob("valid.*"), *corpus.glob("tokenizer/*")):
        remote.send(file, str(file.relative_to(corpus)), lambda: None)


def test_run_reads_corpora_and_tokenizer_of_a_bucket(s3, copied, corpus, cache, tiny_run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in credentials(s3).items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        url = f"s3://{BUCKET}/corpus"
        put(corpus, url)
        parts = {"train": "train", "valid": "valid", "tokenizer": "tokenizer"}
        data = [f"data.{field}={url}/{name}" for field, name in parts.items()]
        run = tmp_path / "run"
        done = train(
            tiny_run, f"run_dir={run}", *SHORT, *data, "parallel.pipe=1", KEEP_2, processes=1
        )
    assert done.returncode == 0, done.stderr
    assert [e["loss"] for e in read_metrics(run)[0]] == pytest.approx(
        [e["loss"] for e in read_metrics(copied[0])[0]], rel=1e-5
    )
    assert load_run(run).data.train == f"{url}/train"
    staged = list(cache.glob("corpora/*/*.bin"))
    assert sorted(file.name for file in staged) == ["train.bin", "valid.bin"]
    assert "unigram entropy" in done.stdout  # of the manifests


# Settings


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("checkpoint.copy_to=bucket/run", "write s3://BUCKET/FOLDER"),
        ("checkpoint.copy_to=az://bucket/run", "write s3://BUCKET/FOLDER"),
        ("checkpoint.copy_to=s3://key:secret@bucket/run", "keys do not belong into a run file"),
        ("checkpoint.copy_to=file://run", "write file:///FOLDER"),
        ("checkpoint.copy_required=true", "has no effect without copy_to"),
        ("checkpoint.copy_wait_s=5", "has no effect without copy_to"),
        ("data.train=ftp://host/train", "write s3://BUCKET/FOLDER"),
    ],
)
def test_wrong_settings_are_refused(override, said, capsys, tiny_run, tmp_path):
    assert said in refused(capsys, "plan", tiny_run, f"run_dir={tmp_path}", override)


def test_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("est_ds.data.remote.PACKAGES", {"s3": ("no_such_package", "s3")})
    with pytest.raises(UserError) as error:
        Bucket("s3://bucket/run")
    assert "checkpoint.copy_to='s3://bucket/run' needs the package no_such" in str(error.value)
    assert "pip install 'est_ds[s3]'" in str(error.value)
    with pytest.raises(UserError, match="^corpus s3://bucket/train needs the package no_such"):
        read_manifest("s3://bucket/train")


def test_keys_stand_in_no_message(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    text = f"http://me:{SECRET}@host/b?X-Amz-Signature=abc&X-Amz-Credential=def/x {SECRET}"
    assert without_keys(text) == "http://...@host/b?X-Amz-Signature=...&X-Amz-Credential=... ..."
