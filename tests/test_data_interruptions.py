"""Packing that is killed, fails or finds no room goes on where it was, byte for byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.__main__ import main
from est_ds.data.indexed import Corpus
from packings import SmallSteps, files_of, pack, pack_arguments, source, texts  # noqa: F401


def committed(state):
    """When it was written; None if it is not there."""
    try:
        return state.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def test_packing_killed_at_random_moments_ends_byte_identical(source, tokenizer, tmp_path):
    more = ("--shard-tokens", "9000", "--held-out", "0.2")
    pack(source, tokenizer, tmp_path / "whole", *more)
    expected = files_of(tmp_path / "whole")
    out = tmp_path / "killed" / "whole"
    draws, kills, resumed = random.Random(1), 0, 0
    while kills < 10:
        arguments = pack_arguments(source, tokenizer, out, *more, "--workers", draws.choice("112"))
        packing = SmallSteps(arguments, tmp_path)
        process = packing.process
        state = Path(f"{out}.packing", "state.npz")
        before = committed(state)
        # From its first commit on, at any moment.
        while process.is_alive() and committed(state) in (None, before):
            time.sleep(0.002)
        time.sleep(draws.random() * 0.03)
        if process.is_alive():
            process.kill()
            kills += 1
        code, said, _ = packing.end()
        resumed += "going on after" in said
        if code == 0:  # was too fast: it may as well begin again
            assert files_of(out) == expected
            shutil.rmtree(out.parent)
    code, _, error = SmallSteps(pack_arguments(source, tokenizer, out, *more), tmp_path).end()
    assert code == 0, error
    assert files_of(out) == expected
    assert resumed >= 5
    Corpus.open(f"{out}.train").check_hashes()


def test_packing_that_dies_while_files_move_into_place_is_continued(
    source, tokenizer, tmp_path, monkeypatch
):
    more = ("--shard-tokens", "9000")
    pack(source, tokenizer, tmp_path / "whole", *more)
    expected = files_of(tmp_path / "whole")
    out = tmp_path / "died" / "whole"
    replace, moves = os.replace, []

    def dies(source_, target):
        moves.append(target)
        if len(moves) == 12:
            raise KeyboardInterrupt
        replace(source_, target)

    monkeypatch.setattr("data_prep.packing.os.replace", dies)
    assert main(pack_arguments(source, tokenizer, out, *more)) == 130
    monkeypatch.undo()
    assert 2 < len(files_of(out.parent / "whole-")) < len(expected) - 1
    assert not Path(f"{out}.manifest.json").exists()
    # Whatever is added now comes too late for the corpus that was complete.
    assert main(pack_arguments(source, tokenizer, out, *more)) == 0
    assert files_of(out) == expected


@pytest.fixture
def interrupted(source, tokenizer, tmp_path, monkeypatch, capsys):
    """The arguments of a packing that failed in its third file; the bad line's file."""
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    bad = folder / "2.jsonl"
    bad.write_text(bad.read_text().replace("\n", '\n{"text": 1}\n', 1))
    monkeypatch.setattr("data_prep.packing.COMMIT_EVERY_S", 0.0)
    monkeypatch.setattr("data_prep.pack.PIECE_BYTES", 10_000)
    monkeypatch.setattr("data_prep.readers.delimited.PIECE_BYTES", 10_000)
    arguments = pack_arguments(folder, tokenizer, tmp_path / "c", "--workers", "1")
    assert main(arguments) == 2
    assert "c.packing keeps what is packed" in capsys.readouterr().err
    return arguments, bad


def test_after_a_bad_document_packing_goes_on_with_it_corrected_or_left_out(
    interrupted, source, tokenizer, tmp_path, capsys
):
    arguments, bad = interrupted
    assert not (tmp_path / "c.bin").exists()
    pack(source, tokenizer, tmp_path / "whole")
    shutil.copytree(tmp_path / "c.packing", tmp_path / "other.packing")
    assert main([*arguments, "--invalid", "skip"]) == 0
    said = capsys.readouterr().out
    assert "going on after" in said and "left out: 1 invalid (the first: 2.jsonl#2)" in said
    assert Corpus.open(tmp_path / "c").manifest.skipped == {"invalid": 1}
    shutil.copy(source / "2.jsonl", bad)
    arguments[arguments.index(str(tmp_path / "c"))] = str(tmp_path / "other")
    assert main(arguments) == 0
    whole = files_of(tmp_path / "whole")
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"c{ending}").read_bytes() == whole[ending]
        assert (tmp_path / f"other{ending}").read_bytes() == whole[ending]


def test_another_packing_is_not_continued_by_mistake(interrupted, tmp_path, capsys):
    arguments, bad = interrupted
    for more, says in (
        (["--no-bos"], "bos=1, now bos=None"),
        (["--held-out", "0.1"], "held_out=None, now held_out=0.1"),
        (["--shard-tokens", "5"], "shard_tokens="),
    ):
        assert main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert says in error and "--fresh" in error
    first = bad.with_name("0.jsonl")
    first.write_text(first.read_text() + '{"text": "more"}\n')
    assert main(arguments) == 2
    assert "some were changed" in capsys.readouterr().err
    assert main([*arguments, "--fresh", "--invalid", "skip"]) == 0
    assert Corpus.open(tmp_path / "c").num_documents == 401
    assert not Path(tmp_path / "c.packing").exists()


def test_two_packings_of_one_name_do_not_mix(source, tokenizer, tmp_path, capsys):
    arguments = pack_arguments(source, tokenizer, tmp_path / "c")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, os, sys, time; os.mkdir(sys.argv[1]);"
            "f = open(sys.argv[1] + '/lock', 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held');"
            "sys.stdout.flush(); time.sleep(60)",
            tmp_path / "c.packing",
        ],
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    assert main(arguments) == 2
    assert "another process is packing" in capsys.readouterr().err
    holder.kill()
    holder.communicate()
    assert main(arguments) == 0


@pytest.fixture
def packing_of_two(source, tokenizer, tmp_path):
    """A packing by two workers that has begun, and the ids of these."""
    arguments = pack_arguments(source, tokenizer, tmp_path / "c", "--workers", "2")
    packing, ids = SmallSteps(arguments, tmp_path), []
    while packing.process.is_alive() and len(ids) < 2:
        ids = packing.workers()
    assert len(ids) == 2
    yield packing, ids
    packing.process.kill()
    packing.process.join()


def runs(process_id):
    """Whether it does: an orphan may stay as a zombie where nothing reaps it."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_when_their_parent_is_killed(packing_of_two):
    packing, children = packing_of_two
    packing.process.kill()
    packing.process.join()
    deadline = time.monotonic() + 20
    while any(map(runs, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_that_dies_ends_the_packing_which_can_be_continued(
    packing_of_two, source, tokenizer, tmp_path
):
    packing, children = packing_of_two
    os.kill(children[-1], signal.SIGKILL)
    code, _, error = packing.end()
    assert code == 1, error
    assert "error: one of the 2 worker processes died" in error and "Traceback" not in error
    pack(source, tokenizer, tmp_path / "c")
    pack(source, tokenizer, tmp_path / "whole")
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_is_one_clear_error_and_packing_goes_on_when_there_is_room(
    source, tokenizer, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk)
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        arguments = pack_arguments(source, tokenizer, disk / "c", "--shard-tokens", "9000")
        code, said, errors = SmallSteps(arguments, tmp_path).end()
        assert code == 1, (said, errors)
        error = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and "no space left" in error[0] and "Traceback" not in errors
        assert not list(disk.glob("c*.bin")) and not list(disk.glob("*.json"))
        subprocess.run(("mount", "-o", "remount,size=20m", disk), check=True)
        code, said, errors = SmallSteps(arguments, tmp_path).end()
        assert code == 0 and "going on after" in said, errors
        pack(source, tokenizer, tmp_path / "c", "--shard-tokens", "9000")
        assert files_of(disk / "c") == files_of(tmp_path / "c")
    finally:
        subprocess.run(("umount", disk), check=True)
