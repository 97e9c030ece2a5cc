"""What `pip install` gives: est_ds with the run files that it ships."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from conftest import ROOT, refused
from est_ds.config import presets
from est_ds.config.run_file import load_run


def test_shipped_run_files_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = sorted(f.stem for f in (ROOT / "configs" / "run").glob("*.yaml"))
    assert list(presets.run_files()) == names
    for name in names:
        assert load_run(name) == load_run(ROOT / "configs" / "run" / f"{name}.yaml")
    # What is here goes first.
    shutil.copy(ROOT / "configs" / "run" / "quickstart.yaml", tmp_path / "est_gpt2")
    (tmp_path / "est_gpt2").write_text(
        (tmp_path / "est_gpt2").read_text().replace("../model", str(ROOT / "configs" / "model"))
    )
    assert load_run("est_gpt2").run_dir == "runs/quickstart"


def test_a_name_that_is_not_shipped_is_one_clear_error(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, "plan", "est_gtp2")
    assert "'est_gtp2' does not exist" in error and "did you mean 'est_gpt2'?" in error
    assert "raptr_bert" in error
    for path in ("est_gpt2.yaml", "configs/run/est_gpt2.yaml"):
        error = refused(capsys, "plan", path)
        assert f"{path!r} does not exist" in error and "shipped: est_gpt2." in error
    assert "shipped" not in refused(capsys, "plan", "other.yaml")


@pytest.mark.slow
def test_an_installed_wheel_has_verbs_and_run_files(tmp_path):
    tree = tmp_path / "tree"  # what git has: a build leaves folders beside setup.py
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in files.stdout.splitlines():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():  # a link to a folder is none
            shutil.copy(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", "-q", *options, "-w", tmp_path, tree], check=True)
    [wheel] = tmp_path.glob("est_ds-*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "-q", *options, wheel], check=True)
    [packages] = environment.glob("lib/python*/site-packages")
    # Its dependencies, without the checkout: a folder named so loads no .pth of its own.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"DS_ACCELERATOR": "cpu"}

    def said(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = said(python, "-c", "import est_ds, data_prep; print(est_ds.__file__)")
    assert Path(where.strip()).is_relative_to(packages)
    said_plan = said(environment / "bin" / "est-ds", "plan", "est_tinyllama")
    assert "runs/est_tinyllama: method est, 24,000 steps" in said_plan
    assert "1,100,048,384 parameters" in said_plan
