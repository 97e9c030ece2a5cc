"""`est-ds export --push`: what is exported is in the repository, and nobody is shown the token."""

from __future__ import annotations

import logging

import pytest
from huggingface_hub import constants

from conftest import refused
from est_ds import cli
from est_ds.errors import Failure
from est_ds.export.folder import MARK
from est_ds.export.hub import find_hub
from publishing import WritableHub, writable_hub

GPT2_CELL = ("gpt2", "causal", "fp32")


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_pushed_export_is_in_the_repository_and_a_former_one_is_not(
    fast_exports, tmp_path, monkeypatch, capsys, caplog
):
    run_dir, files = fast_exports[GPT2_CELL], tmp_path / "repository"
    caplog.set_level(logging.DEBUG)
    with writable_hub(files, monkeypatch) as hub:
        cli.main(["export", str(run_dir), "--push", "small"])
        said = capsys.readouterr()
        exported = contents(run_dir / "export")
        mark = exported.pop(MARK)
        assert contents(files) == exported and "README.md" in exported
        assert said.out.splitlines()[-1].startswith("pushed to http://127.0.0.1:")
        assert said.out.splitlines()[-1].endswith("/someone/small")
        assert any(
            "after 2 steps" in body.decode() for line, body in hub.said if "/commit/" in line
        )
        made = [body for line, body in hub.said if "/repos/create" in line]
        assert b'"private"' in made[0]
        assert str(run_dir).encode() in mark and not [
            name for name, content in contents(files).items() if str(run_dir).encode() in content
        ]

        for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes"):
            (files / name).write_text("of a former export, or the user's")
        find_hub("someone/small").push(run_dir / "export", "again", without=MARK)
        assert contents(files).keys() == {*exported, "notes"}
    for text in (said.out, said.err, caplog.text):
        assert hub.token not in text


def test_the_streamed_upload_of_small_files_arrives_too(tmp_path, monkeypatch):
    """huggingface_hub goes another way where its own store is installed."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with writable_hub(tmp_path / "repository", monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        find_hub("small").push(folder, "message", without=MARK)
    assert contents(tmp_path / "repository") == contents(folder)


def test_what_stops_a_push_is_said_in_a_line_before_anything_is_computed(
    tmp_path, monkeypatch, capsys
):
    """Not even the run is looked at."""
    none = tmp_path / "none"
    assert "is no name of a repository" in refused(capsys, "export", none, "--push", "a/b/c")
    with writable_hub(tmp_path / "repository", monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_" + "w" * 30)
        error = refused(capsys, "export", none, "--push", "small")
        assert "does not know the token" in error and "hf_" not in error
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        assert "needs a token of http://127.0.0.1:" in refused(
            capsys, "export", none, "--push", "small"
        )
    monkeypatch.setenv("HF_TOKEN", WritableHub.token)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    error = refused(capsys, "export", none, "--push", "small")
    assert "http://127.0.0.1:9 cannot be reached" in error and "hf upload small DIR" in error
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "OfflineModeIsEnabled" in refused(capsys, "export", none, "--push", "small")


def test_a_push_that_the_hub_refuses_leaves_the_export_and_says_how_to_repeat_it(
    tmp_path, monkeypatch
):
    """A server that repeats the token does not get it shown."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with writable_hub(tmp_path / "repository", monkeypatch, takes_commits=False) as hub:
        with pytest.raises(Failure, match="is exported, but .* does not take it as 'small'") as e:
            find_hub("small").push(folder, "message", without=MARK)
    assert f"`hf upload small {folder} --private --exclude {MARK}`" in str(
        e.value
    ) and "no room" in str(e.value)
    assert hub.token not in str(e.value)
    assert (folder / "config.json").is_file()
