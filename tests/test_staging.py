"""Corpora of a bucket are copied to this machine, once, and only where they are read."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from conftest import ROOT
from est_ds.config.run_file import load_run
from est_ds.data.indexed import Corpus
from est_ds.data.remote import Remote
from est_ds.data.staging import CACHE, _staged_corpus
from est_ds.data.tokenizer import tokenizer_sha256
from est_ds.design import make_design
from est_ds.disk import hold
from est_ds.doctor import facts
from est_ds.errors import UserError
from est_ds.run.prepare import held_out_windows
from forks import fork, wait


def stage(prefix: str) -> None:
    """In a process of its own."""
    Corpus.open(prefix)
    os._exit(0)


def test_staged_corpus_is_fetched_once_and_goes_on_where_it_was_killed(corpus, cache, monkeypatch):
    url, here = f"file://{corpus}/train", Corpus.open(corpus / "train")
    place = cache / "corpora" / here.fingerprint / "train"
    place.parent.mkdir(parents=True)
    content = Path(f"{corpus}/train.bin").read_bytes()
    (place.parent / ".train.bin.partial").write_bytes(content[:1000])
    seen: list[tuple[str, int]] = []
    fetch = Remote.fetch

    def noting(remote, name, file, expected, goes_on):
        fetch(remote, name, file, expected, lambda here: (seen.append((name, here)), goes_on(here)))

    monkeypatch.setattr(Remote, "fetch", noting)
    there = Corpus.open(url)
    assert seen == [("train.bin", 1000), ("train.idx", 0)]
    assert there.fingerprint == here.fingerprint and there.prefix == str(place)
    there.check_hashes()
    assert (there.window(5, 100) == here.window(5, 100)).all()
    _staged_corpus.cache_clear()
    Corpus.open(url)
    assert len(seen) == 2
    # What was cut off later is fetched again.
    os.truncate(place.with_suffix(".idx"), 10)
    _staged_corpus.cache_clear()
    Corpus.open(url).check_hashes()


def test_processes_of_a_machine_fetch_a_corpus_once(corpus, cache, tmp_path):
    url = f"file://{corpus}/train"
    folder = cache / "corpora" / Corpus.open(corpus / "train").fingerprint
    streams = tmp_path / "out", tmp_path / "err"
    with hold(folder / ".lock"):
        environment = {**os.environ, CACHE: str(cache)}
        processes = [fork(stage, (url,), streams, ROOT, environment) for _ in range(3)]
        time.sleep(2)
        assert all(process.is_alive() for process in processes)
        assert not list(folder.glob("*.bin"))
    assert wait(processes, 60) == [0, 0, 0], streams[1].read_text()
    assert streams[1].read_text().count(" are here") == 1


def test_corpus_that_is_not_what_its_manifest_says_is_refused(corpus, cache, tmp_path):
    there = tmp_path / "there"
    shutil.copytree(corpus, there)
    content = bytearray((there / "train.bin").read_bytes())
    content[100] ^= 1
    (there / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match="train.bin is not what was written"):
        Corpus.open(f"file://{there}/train")
    (there / "valid.manifest.json").unlink()
    with pytest.raises(UserError, match="valid.manifest.json does not exist"):
        Corpus.open(f"file://{there}/valid")
    assert not list(cache.glob("corpora/*/*.manifest.json"))


def test_plan_needs_no_corpus_of_a_bucket(corpus, cache):
    assert Corpus.described("file:///nowhere/train") is None
    described = Corpus.described(f"file://{corpus}/train")
    assert described.num_tokens == Corpus.open(corpus / "train").num_tokens
    assert not described.shards and not cache.exists()


def test_held_out_corpora_alone_are_fetched_to_evaluate(corpus, cache, tiny_run):
    url = f"file://{corpus}"
    config = load_run(tiny_run, [f"data.train={url}/train", f"data.valid={url}/valid"])
    [windows] = held_out_windows(make_design(config)).values()
    assert len(windows.corpus.shards) == 1
    assert [file.name for file in cache.glob("corpora/*/*.bin")] == ["valid.bin"]
    # Where the training corpora are gone, the others' manifests serve.
    gone = load_run(tiny_run, [f"data.train={url}/none", f"data.valid={url}/valid"])
    assert list(held_out_windows(make_design(gone))) == list(config.data.held_out)


def test_a_tokenizer_that_is_not_there_is_refused_by_its_name(cache, tmp_path):
    for url in (f"file://{tmp_path}/none", f"file://{tmp_path}"):
        with pytest.raises(UserError, match=f"data.tokenizer='{url}' holds no file of a tokenizer"):
            tokenizer_sha256(url)
    assert not cache.exists()


def test_doctor_fetches_no_corpus(corpus, cache, tiny_run):
    overrides = [f"data.{field}=file://{corpus}/{field}" for field in ("train", "valid")]
    found = facts._run(str(tiny_run), overrides)
    names = {name: Corpus.open(corpus / name).fingerprint for name in ("train", "valid")}
    assert found["corpus"] == names and not cache.exists()
    none = facts._run(str(tiny_run), [f"data.train=file://{corpus}/none"])
    assert "none.manifest.json does not exist" in none["error"]
