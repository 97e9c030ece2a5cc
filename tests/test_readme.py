"""Every config parses and fits, the README's commands run as they are written, and links lead."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, run_command
from est_ds.config.run_file import load_run
from est_ds.design import make_design
from est_ds.report.plan_text import plan_report
from est_ds.slicing.families import hf_config

README = (ROOT / "README.md").read_text()
RUN_FILES = sorted((ROOT / "configs" / "run").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda f: f.stem)
@pytest.mark.parametrize(
    "overrides", [[], ["steps=24"], ["method.name=full"]], ids=["as is", "24 steps", "dense twin"]
)
def test_run_file_is_a_valid_run(file, overrides):
    config = load_run(file, overrides)
    make_design(config)
    report = json.loads(plan_report(config, as_json=True))
    assert report["total_steps"] == config.steps
    assert (report["saved"]["blocks"] > 0) == (config.method["name"] != "full")


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs" / "mixture").glob("*.yaml")), ids=lambda f: f.stem
)
def test_mixture_file_is_the_data_section_of_a_run(file):
    run = load_run(ROOT / "configs" / "run" / "est_tinyllama.yaml", [f"data={file}"])
    make_design(run)
    assert [part.weight for part in run.data.parts] == [0.6936, 0.3064]
    assert run.data.held_out.keys() == {"slimpajama", "starcoder"}


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "model").glob("*.yaml")), ids=str)
def test_model_file_is_a_hugging_face_config(file):
    hf_config(yaml.safe_load(file.read_text()))


def test_run_file_in_the_readme_is_the_quickstart():
    [text] = blocks("yaml")
    shown = yaml.safe_load(text)
    shipped = yaml.safe_load((ROOT / "configs" / "run" / "quickstart.yaml").read_text())
    assert shown.pop("deepspeed") == {} and shown.pop("objective") == {"name": "causal"}
    for section, fields in shown.items():
        if not isinstance(fields, dict):
            assert fields == shipped[section]
            continue
        for field, value in fields.items():
            if field != "phases":
                assert shipped[section][field] == value, f"{section}.{field}"
    assert [p["until"] for p in shown["method"]["phases"]] == [
        p["until"] for p in shipped["method"]["phases"]
    ]


def test_readme_fits_three_screens():
    assert len(README.splitlines()) <= 135


def anchors(page: Path) -> set[str]:
    """What a link to a heading of a page may say behind its `#`."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_pages_lead_to_files_and_headings():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    broken = []
    for page in (ROOT / name for name in listed.stdout.split("\0") if name):
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists() or heading and heading not in anchors(target):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def test_commands_of_your_own_run_work_as_they_are_printed(tmp_path):
    """In one shell, in a folder that has the checkout's `configs`, and `launch/env.sh` of it."""
    [block] = [b for b in blocks("") if "data_prep" in b]
    (tmp_path / "my" / "texts").mkdir(parents=True)
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]:
        shutil.copy(source, tmp_path / "my" / "texts")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "env.sh").write_text(f"source {shlex.quote(str(ROOT))}/launch/env.sh\n")
    done = run_command("bash", "-euo", "pipefail", "-c", block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "runs/own is done" in done.stdout + done.stderr
    run_dir = tmp_path / "runs" / "own"
    assert (run_dir / "export" / "model.safetensors").is_file()
    assert (run_dir / "report.html").is_file()
