"""The summary's figures, worked out by hand, and the page."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from cases.tiny import TINY_MODEL

from est_ds.config.run_file import load_run
from est_ds.config.sections import RunConfig
from est_ds.data.manifest import Manifest, manifest_path
from est_ds.errors import UserError
from est_ds.report.page import write_report
from est_ds.report.summary import print_summary, summarise
from est_ds.run.directory import write_config
from est_ds.run.metrics import FILE, MetricsFile

PHASES = [
    {"name": "small", "until": 4, "layers": 0.5, "heads": 0.5, "columns": 0.5},
    {"name": "na<rr>ow [b]", "until": 6, "heads": 0.5, "columns": 0.5},
    {"name": "full", "until": 10},
]
STEP_S = [9.0, 1.0, 1.2, 1.1, 2.0, 2.4, 4.0, 4.0, 5.0, 4.0]
# Model and block FLOPs of each phase, of 100 and 80.
ACTIVE = {0: (40, 20), 1: (60, 40), 2: (100, 80)}


def make_run(folder, *, method=None, num_steps=10, every=1, evaluate=True, manifest=True):
    """A run directory as the training loop leaves it after `num_steps` steps."""
    config = RunConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "steps": 10,
            "model": TINY_MODEL,
            "method": method or {"name": "est", "phases": PHASES},
            "data": {
                "train": str(folder / "train"),
                "valid": str(folder / "valid"),
                "tokenizer": "absent",
                "sequence": 64,
            },
            "batch": {"global": 8, "micro": 2},
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"every": 5},
            "evaluate": {"every": 5, "sequences": 4},
            "log": {"every": every},
        }
    )
    write_config(config)
    if manifest:
        write_manifest(str(folder / "valid"), entropy=5.5)
    metrics = MetricsFile(folder / "run", 0)
    for step in range(num_steps):
        phase = sum(step >= p["until"] for p in PHASES)
        flops, blocks = ACTIVE[phase] if method is None else ACTIVE[2]
        if (step + 1) % every == 0 or step + 1 in (4, 6, 10):
            metrics.write(
                step=step,
                phase=PHASES[phase]["name"],
                loss=6.0 - step / 10,
                lr=1e-3,
                grad_norm=1.0,
                tokens=(step + 1) * 512,
                step_s=STEP_S[step],
                tokens_per_s=512 / STEP_S[step],
                flops_active=flops,
                flops_dense=100,
                blocks_active=blocks,
                blocks_dense=80,
                kept_layers=4,
            )
        if evaluate and (step + 1) % 5 == 0:
            metrics.write(step=step, eval_loss=5.0 - step / 10)
    metrics.close()
    return folder / "run"


def write_manifest(prefix, *, entropy):
    manifest = Manifest(
        format_version=1,
        num_tokens=1,
        num_documents=1,
        dtype="uint16",
        vocabulary=512,
        bos_id=None,
        eos_id=None,
        text_bytes=1,
        unigram_entropy=entropy,
        tokenizer_sha256="0" * 64,
        bin_bytes=1,
        idx_bytes=1,
        bin_sha256="0" * 64,
        idx_sha256="0" * 64,
    )
    manifest_path(prefix).write_text(manifest.model_dump_json())


@pytest.mark.parametrize("every", [1, 2])
def test_summary_is_as_worked_out_by_hand(tmp_path, every):
    summary = summarise(make_run(tmp_path, every=every))
    assert (summary.num_steps, summary.tokens) == (10, 5120)
    # Of 1000 and 800: 4 x 40 + 2 x 60 + 4 x 100 and 4 x 20 + 2 x 40 + 4 x 80.
    assert summary.saved_model == pytest.approx(1 - 680 / 1000)
    assert summary.saved_blocks == pytest.approx(1 - 480 / 800)
    assert (summary.eval_loss, summary.eval_step) == (pytest.approx(4.1), 9)
    assert (summary.valid_entropy, summary.train_entropy) == (5.5, None)
    if every == 2:
        return
    # Step 0 warms up and is left out of small's median.
    assert [p.median_step_s for p in summary.phases] == pytest.approx([1.1, 2.2, 4.0])
    assert [p.time_ratio for p in summary.phases] == pytest.approx([0.275, 0.55, 1.0])
    assert [p.model_ratio for p in summary.phases] == pytest.approx([0.4, 0.6, 1.0])
    assert [p.blocks_ratio for p in summary.phases] == pytest.approx([0.25, 0.5, 1.0])
    assert summary.time_s == pytest.approx(4 * 1.1 + 2 * 2.2 + 4 * 4.0)
    assert summary.saved_time == pytest.approx(1 - 24.8 / 40)
    assert summary.efficiency == pytest.approx(0.38 / 0.32)


def test_time_saved_is_unknown_before_the_full_model_trains(tmp_path, capsys):
    run_dir = make_run(tmp_path, num_steps=5)
    summary = summarise(run_dir)
    assert (summary.num_steps, summary.saved_time, summary.efficiency) == (5, None, None)
    assert (summary.full_step_s, summary.full_from) == (None, 6)
    assert summary.saved_model == pytest.approx(1 - (4 * 40 + 60) / 500)
    print_summary(run_dir)
    assert "from step 6" in capsys.readouterr().out


def test_run_without_a_full_phase_invents_no_time_saved(tmp_path, capsys):
    phases = [{**PHASES[0], "until": 10}]
    summary = summarise(make_run(tmp_path, method={"name": "est", "phases": phases}))
    assert (summary.saved_time, summary.full_from) == (None, None)
    print_summary(tmp_path / "run")
    assert "no phase trains the full model" in capsys.readouterr().out


def test_dense_run_says_that_nothing_is_saved(tmp_path, capsys):
    run_dir = make_run(tmp_path, method={"name": "full"}, manifest=False)
    summary = summarise(run_dir)
    assert (summary.saved_model, summary.saved_time, summary.efficiency) == (0.0, 0.0, None)
    print_summary(run_dir)
    out = capsys.readouterr().out
    assert "every step trained the full model" in out and "efficiency" not in out
    assert "no manifest" in out


def test_summary_fits_80_columns_without_colour(tmp_path, capsys):
    print_summary(make_run(tmp_path))
    title, *lines = capsys.readouterr().out.strip().splitlines()
    assert str(tmp_path / "run") in title
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert text.isascii() and "\x1b" not in text and "na<rr>ow [b]" in text
    assert "38.0% measured: 24.8 s, and 40.0 s at full-model steps" in text


def test_run_that_was_not_evaluated_says_so(tmp_path, capsys):
    run_dir = make_run(tmp_path, evaluate=False)
    assert summarise(run_dir).eval_loss is None
    print_summary(run_dir)
    assert "not evaluated yet; last training loss 5.1" in capsys.readouterr().out
    write_report(run_dir)


def test_folder_that_is_no_run_is_refused(tmp_path):
    for read in (summarise, write_report):
        with pytest.raises(UserError, match="no config.yaml.*est-ds train"):
            read(tmp_path)


def test_missing_and_partial_metrics_are_refused(tmp_path):
    run_dir = make_run(tmp_path)
    lines = (run_dir / FILE).read_text().splitlines(keepends=True)
    for broken, message in (
        ([], "no line of a training step"),
        (lines[6:], "no line of phase 'small'"),
        ([json.dumps({"step": 0, "loss": 1.0}) + "\n"], "step 0 has no phase, tokens"),
        ([lines[0].replace('"step": 0', '"step": 10')], "beyond steps=10"),
    ):
        (run_dir / FILE).write_text("".join(broken))
        for read in (summarise, write_report):
            with pytest.raises(UserError, match=message):
                read(run_dir)
    (run_dir / FILE).unlink()
    with pytest.raises(UserError, match="no line of a training step"):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_page_is_well_formed_and_complete_without_network(tmp_path):
    run_dir = make_run(tmp_path)
    file = write_report(run_dir)
    assert file == run_dir / "report.html"
    assert not list(run_dir.glob("*.partial"))
    page = ET.fromstring(file.read_text())
    text = "".join(page.itertext())
    for name in (p["name"] for p in PHASES):
        assert name in text
    assert load_run(run_dir).to_yaml() in text
    assert "deepspeed" in text and "38.0% measured" in text
    images = [element.get("src") for element in page.iter("img")]
    assert len(images) == 4
    assert all(source.startswith("data:image/svg+xml;base64,") for source in images)
    assert "http" not in text


def test_page_of_a_run_of_one_step_is_drawn(tmp_path):
    write_report(make_run(tmp_path, num_steps=1, evaluate=False))
