"""The summary's figures, worked out by hand, and the page."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from a_run import PHASES, STEP_S, make_run, write_manifest
from conftest import refused
from est_ds.cli import main
from est_ds.config.run_file import load_run
from est_ds.data.manifest import read_manifest
from est_ds.errors import UserError
from est_ds.report.curves import GUESS, Line, curves_figure
from est_ds.report.interactive import look
from est_ds.report.page import write_report
from est_ds.report.summary import summarise
from est_ds.report.text import print_summary
from est_ds.run.metrics import FILE
from pages import Page


def test_a_run_on_gpus_says_its_seconds_mfu_and_memory(tmp_path, capsys):
    print_summary(make_run(tmp_path, gpu=True))
    said = " ".join(capsys.readouterr().out.split())
    assert "tokens trained 5,120, in 33.7 s of steps" in said
    # Medians over the lines, by hand: steps of 9, 1, 1.2 and 1.1 s; of 2 and 2.4 s; of 4, 4, 5, 4.
    assert "GPUs, small MFU 17.4% (dense 43.6%), 9 GB on a GPU" in said
    assert "GPUs, na<rr>ow [b] MFU 13.8% (dense 22.9%), 5 GB on a GPU" in said
    assert "GPUs, full MFU 12.5% (dense 12.5%), 3 GB on a GPU" in said
    print_summary(make_run(tmp_path / "cpu"))
    assert "MFU" not in capsys.readouterr().out


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
    # The first 3 steps come after the start, and are left out of small's median.
    assert [p.median_step_s for p in summary.phases] == pytest.approx([1.1, 2.2, 4.0])
    assert [p.time_ratio for p in summary.phases] == pytest.approx([0.275, 0.55, 1.0])
    assert [p.model_ratio for p in summary.phases] == pytest.approx([0.4, 0.6, 1.0])
    assert [p.blocks_ratio for p in summary.phases] == pytest.approx([0.25, 0.5, 1.0])
    assert [p.timing.count for p in summary.phases] == [1, 2, 4]
    assert summary.time_s == pytest.approx(4 * 1.1 + 2 * 2.2 + 4 * 4.0)
    assert summary.saved_time == pytest.approx(1 - 24.8 / 40)
    assert summary.efficiency == pytest.approx(0.38 / 0.32)
    assert summary.saved_between is None and not summary.saving_tells


def test_time_saved_is_unknown_before_the_full_model_trains(tmp_path, capsys):
    run_dir = make_run(tmp_path, num_steps=5)
    summary = summarise(run_dir)
    assert (summary.num_steps, summary.saved_time, summary.efficiency) == (5, None, None)
    assert (summary.full_step_s, summary.full_from) == (None, 6)
    assert summary.saved_model == pytest.approx(1 - (4 * 40 + 60) / 500)
    print_summary(run_dir)
    assert "from step 7" in capsys.readouterr().out


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
    assert "every step computed the full model" in out and "efficiency" not in out
    assert "no manifest" in out


def test_summary_fits_80_columns_without_colour(tmp_path, capsys):
    print_summary(make_run(tmp_path))
    title, *lines = capsys.readouterr().out.strip().splitlines()
    assert str(tmp_path / "run") in title
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert text.isascii() and "\x1b" not in text and "na<rr>ow [b]" in text
    # Seven steps after the start are too few to say anything.
    unfolded = " ".join(text.split())
    assert "not known: an interval takes 6 timed steps of every phase" in unfolded
    assert "efficiency" not in text and "measured" not in text
    assert "7 in unknown layout (metrics.jsonl does not say it); left out: 3 after" in unfolded


def test_growing_model_is_evaluated_at_its_depth(tmp_path, capsys):
    phases = [{"until": 6, "layers": 2}, {"until": 10, "layers": 4}]
    method = {"name": "stacking", "mode": "double", "phases": phases}
    run_dir = make_run(tmp_path, method=method, num_steps=6)
    assert summarise(run_dir).eval_layers == 2
    print_summary(run_dir)
    assert "depth 2 of 4 after 5 steps" in " ".join(capsys.readouterr().out.split())
    assert "full model after" not in write_report(run_dir).read_text()
    run_dir = make_run(tmp_path / "whole", method=method)
    print_summary(run_dir)
    assert "full model after 10 steps" in " ".join(capsys.readouterr().out.split())


def test_nats_are_given_in_bits_per_byte_where_bytes_are_known(tmp_path, capsys):
    # 30 tokens of 100 bytes: 4.1 nats a token are 4.1 x 30 / 100 / ln 2 = 1.7745 bits a byte.
    run_dir = make_run(tmp_path)
    write_manifest(str(tmp_path / "valid"), entropy=5.5, num_tokens=30, text_bytes=100)
    summary = summarise(run_dir)
    assert summary.eval_bits == pytest.approx(1.77452, abs=1e-5)
    assert summary.valid_bits == pytest.approx(5.5 * 0.3 / 0.693147, rel=1e-5)
    print_summary(run_dir)
    assert "4.1000 nats per token (1.7745 bits per byte)" in capsys.readouterr().out
    # Of 3 documents kept apart the first tokens are no targets: 27 are.
    manifest = read_manifest(str(tmp_path / "valid"))
    assert manifest.bits_per_byte(4.1, apart=True) == pytest.approx(1.77452 * 27 / 30, abs=1e-5)
    masked = make_run(tmp_path / "mlm", objective="ul2")
    assert summarise(masked).eval_bits is None


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
    assert "deepspeed" in text and "an interval takes 6 timed steps" in text
    assert "Steps count from 1, in metrics.jsonl from 0." in text and "na<rr>ow [b]5-6" in text
    images = [element.get("src") for element in page.iter("img")]
    assert len(images) == 4
    assert all(source.startswith("data:image/svg+xml;base64,") for source in images)
    assert "http" not in text


def test_page_of_a_run_of_one_step_is_drawn(tmp_path):
    write_report(make_run(tmp_path, num_steps=1, evaluate=False))


def test_several_runs_stand_on_one_page_over_what_they_cost(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", method={"name": "full"})]
    write_manifest(str(tmp_path / "b" / "valid"), entropy=5.5)
    out = tmp_path / "both.html"
    main(["report", *map(str, runs), "--out", str(out)])
    assert capsys.readouterr().out == f"the report is {out}\n"
    page = Page(out.read_text())
    assert page.rows().keys() == {"run", *map(str, runs)}
    # Each has its corpora in a folder of its own.
    assert "runs differ in data.valid: their losses cannot be compared" in page.text
    plot = page.plot("held-out")
    assert [trace["name"] for trace in plot.traces] == list(map(str, runs))
    assert [trace["y"] for trace in plot.traces] == [[pytest.approx(4.6), pytest.approx(4.1)]] * 2
    # By hand: evaluated after 5 and 10 steps, of 512 tokens each; STEP_S and ACTIVE summed.
    assert plot.button("tokens")[0]["x"] == [[2560, 5120]] * 2
    flops = [[4 * 40 + 60, 4 * 40 + 2 * 60 + 4 * 100], [500, 1000]]
    assert plot.button("FLOPs")[0]["x"] == flops
    seconds = [[pytest.approx(9.0 + 1.0 + 1.2 + 1.1 + 2.0), pytest.approx(sum(STEP_S))]] * 2
    assert plot.button("seconds")[0]["x"] == seconds
    assert len(page.plot("training").traces[0]["y"]) == 10


def shown(*curves: list[float]) -> tuple[float, float]:
    """What of these curves is in sight at first."""
    lines = [
        Line(f"{i}", "", look(i), {"tokens": list(range(len(y)))}, y) for i, y in enumerate(curves)
    ]
    return curves_figure(lines, ["tokens"], "").layout.yaxis.range


FALLING = [10.0, 6.0, 5.0, 4.0, 3.5, 3.3, 3.2, 3.1, 3.05, 3.0]


@pytest.mark.parametrize("other", [[8.9, 8.8, 8.7], [9.0], [2.0, 1.0, 0.5]])
def test_no_run_is_wholly_out_of_sight_at_first(other):
    for curves in ([FALLING, other], [other, FALLING], [FALLING, FALLING, other]):
        low, high = shown(*curves)
        assert all(low < curve[-1] < high for curve in curves)
        assert high < 10.0


@pytest.mark.parametrize("last", [400.0, 1e30, float("inf"), float("nan")])
def test_a_run_that_diverged_leaves_the_others_readable(last):
    lost = [10.0, 7.0, 300.0, last]
    for curves in ([FALLING, lost], [lost, FALLING], [lost, FALLING, lost]):
        low, high = shown(*curves)
        assert low < 3.0 and 4.0 < high < GUESS


def test_each_of_56_things_looks_its_own():
    looks = [look(i) for i in range(56)]
    assert len({(of.colour, of.marker) for of in looks}) == 56
    for first in range(29):  # lines have no marker where they have many points
        assert len({(of.colour, of.dash) for of in looks[first : first + 28]}) == 28
    for one, other in zip(looks, looks[1:]):
        assert one.colour != other.colour and one.marker != other.marker
    assert look(None).colour not in {of.colour for of in looks}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a/run", "a/../a/run"], "'a/../a/run' is given twice"),
        (["a/run", "b/run"], "run directory 'b/run' has no config.yaml"),
        (["a/run", "--out", "x.html"], "--out=x.html has no effect on a single run"),
        (["a/run", "c/run", "--out", "no/x.html"], "report 'no/x.html' cannot be written"),
    ],
)
def test_what_several_runs_cannot_be_is_refused(tmp_path, monkeypatch, capsys, words, expected):
    make_run(tmp_path / "a"), make_run(tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, "report", *words)
    assert not list(tmp_path.glob("*.html"))
