"""The summary's figures, worked out by hand, and the page."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from cases.tiny import TINY_MODEL
from conftest import refused
from est_ds.cli import main
from est_ds.config.run_file import load_run
from est_ds.config.sections import RunConfig
from est_ds.data.manifest import Manifest, manifest_path, read_manifest
from est_ds.errors import UserError
from est_ds.report.page import write_report
from est_ds.report.summary import summarise
from est_ds.report.text import print_summary
from est_ds.report.times import timing
from est_ds.run import step_times
from est_ds.run.directory import write_config
from est_ds.run.metrics import FILE, MetricsFile
from est_ds.run.step_times import StepTimes, Turns
from pages import Page

PHASES = [
    {"name": "small", "until": 4, "layers": 0.5, "heads": 0.5, "columns": 0.5},
    {"name": "na<rr>ow [b]", "until": 6, "heads": 0.5, "columns": 0.5},
    {"name": "full", "until": 10},
]
STEP_S = [9.0, 1.0, 1.2, 1.1, 2.0, 2.4, 4.0, 4.0, 5.0, 4.0]
# Model and block FLOPs of each phase, of 100 and 80.
ACTIVE = {0: (40, 20), 1: (60, 40), 2: (100, 80)}


def make_run(
    folder,
    *,
    method=None,
    num_steps=10,
    every=1,
    evaluate=True,
    manifest=True,
    steps=10,
    phases=(4, 6, 10),
    objective="causal",
    gpu=False,
):
    """A run directory as a training loop that did not note layouts left it after `num_steps`."""
    folder.mkdir(exist_ok=True)
    sections = [{**phase, "until": until} for phase, until in zip(PHASES, phases)]
    config = RunConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "steps": steps,
            "model": TINY_MODEL,
            "method": method or {"name": "est", "phases": sections},
            "objective": {"name": objective},
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
    metrics = MetricsFile(folder / "run", 0, {})
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
                **(use_of_gpus(step, flops) if gpu else {}),
            )
        if evaluate and (step + 1) % 5 == 0:
            metrics.write(step=step, eval_loss=5.0 - step / 10)
    metrics.close()
    return folder / "run"


def use_of_gpus(step, flops):
    """What lines of steps on GPUs have besides."""
    rate = 200 * STEP_S[step]  # FLOPs that they could have done meanwhile
    used = {"mfu": flops / rate, "mfu_dense": 100 / rate, "memory_peak_bytes": (9 - step) * 10**9}
    return {"trained_s": sum(STEP_S[: step + 1]), **used}


def write_manifest(prefix, *, entropy, num_tokens=3, text_bytes=1):
    manifest = Manifest(
        format_version=1,
        num_tokens=num_tokens,
        num_documents=3,
        dtype="uint16",
        vocabulary=512,
        bos_id=None,
        eos_id=None,
        text_bytes=text_bytes,
        unigram_entropy=entropy,
        tokenizer_sha256="0" * 64,
        bin_bytes=1,
        idx_bytes=1,
        bin_sha256="0" * 64,
        idx_sha256="0" * 64,
    )
    manifest_path(prefix).write_text(manifest.model_dump_json())


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


def write_turns(run_dir, rounds, others):
    """As if the machine had got slower from round to round, as much in every phase."""
    full = tuple(float(n) for n in range(1, rounds + 1))
    ratios = {"full": (2, 4, 1.0, 1.0), "small": (0, 4, 0.5, 0.25), "narrow": (1, 2, 0.75, 0.5)}
    turns = tuple(
        Turns(
            run="",
            name=name,
            phase=phase,
            num_steps=steps,
            wall_s=tuple(wall * s for s in full),
            cpu_s=tuple(cpu * s for s in full),
        )
        for name, (phase, steps, wall, cpu) in ratios.items()
    )
    times = StepTimes(turns=turns, processors=2, others=others, layout=A)
    times.write(run_dir / step_times.FILE)


def test_time_saved_is_that_of_rounds_measured_in_turns(tmp_path, capsys):
    """Of 10 steps 4 take half and 2 three quarters: 0.25; of processor seconds 0.4."""
    run_dir = make_run(tmp_path)
    write_turns(run_dir, rounds=8, others=1.5)
    summary = summarise(run_dir)
    assert [p.time_ratio for p in summary.phases] == pytest.approx([0.5, 0.75, 1.0])
    assert summary.saved_time == pytest.approx(0.25)
    assert summary.saved_between == pytest.approx((0.25, 0.25)) and summary.saving_tells
    assert summary.saved_cpu == pytest.approx(0.4)
    assert summary.efficiency == pytest.approx(0.25 / 0.32)
    print_summary(run_dir)
    said = capsys.readouterr().out
    assert max(map(len, said.strip().splitlines()[1:])) <= 80
    text = " ".join(said.split())
    assert "25.0% measured in 8 rounds of turns at the end of the run; 95 % interval 25.0%" in text
    assert "busy in these rounds: other processes used 1.5 of 2 processors; 40.0% of proc" in text
    assert "0.78 (time saved / model FLOPs saved)" in text


def test_few_rounds_and_a_quiet_machine_are_said(tmp_path, capsys):
    run_dir = make_run(tmp_path)
    write_turns(run_dir, rounds=5, others=0.1)
    print_summary(run_dir)
    text = " ".join(capsys.readouterr().out.split())
    assert "not known: an interval takes 6 rounds; 25.0% in 5 rounds of turns" in text
    assert "quiet: other processes used 0.1 of 2 processors" in text and "efficiency" not in text


def test_step_times_of_another_version_are_left_alone(tmp_path):
    run_dir = make_run(tmp_path)
    (run_dir / step_times.FILE).write_text('{"format": 9}')
    summary = summarise(run_dir)
    assert summary.turns is None and summary.saved_time == pytest.approx(1 - 24.8 / 40)


A = {"pipe": 1, "zero": 1, "replicas": 1, "micro": 2, "device": "cpu"}
B = {**A, "pipe": 2, "cuts": [2, 4]}


def timed_run(folder, starts, step_s):
    """A run of 80 steps: 20 of a quarter of the FLOPs, 20 of half of them, 40 of the full model.

    Args:
        starts: layout by the step at which processes started.
        step_s: time of a step after its start-up, from step, phase and layout.
    """
    run_dir = make_run(folder, num_steps=0, steps=80, phases=[20, 40, 80])
    for start, layout in starts.items():
        metrics = MetricsFile(run_dir, start, layout)
        for step in range(start, 80):
            phase = (step >= 20) + (step >= 40)
            active = (25, 50, 100)[phase]
            metrics.write_step(
                step=step,
                phase=("small", "na<rr>ow [b]", "full")[phase],
                loss=5.0,
                lr=1e-3,
                tokens=(step + 1) * 512,
                step_s=step_s(step, phase, layout) if step >= start + 3 else 50.0,
                flops_active=active,
                flops_dense=100,
                blocks_active=active,
                blocks_dense=100,
            )
        metrics.close()
    return run_dir


def test_times_are_medians_of_one_layout_with_an_interval(tmp_path, capsys):
    # The machine has three speeds by turns: 2 % faster, as it is, 2 % slower.
    def times(step, phase, layout):
        return (0.4, 0.6, 1.0)[phase] * (1 + (step % 3 - 1) / 50)

    run_dir = timed_run(tmp_path, {0: A, 40: A}, times)
    summary = summarise(run_dir)
    assert [p.timing.count for p in summary.phases] == [17, 20, 37]
    assert [p.median_step_s for p in summary.phases] == pytest.approx([0.4, 0.6, 1.0])
    # 20 steps at .4 and 20 at .6 of 80 save 12 + 8 of 80; FLOPs 15 + 10.
    assert summary.saved_time == pytest.approx(0.25)
    low, high = summary.saved_between
    # The worst: .4 x 1.02 / .98, .6 x 1.02 / .98, and the other way round.
    assert 0.25 - 0.25 * 0.041 <= low < 0.25 < high <= 0.25 + 0.25 * 0.041
    assert summary.efficiency == pytest.approx(0.8) and summary.saving_tells
    print_summary(run_dir)
    out = " ".join(capsys.readouterr().out.split())
    assert "25.0% measured: 60.0 s, and 80.0 s at full-model steps; 95 % interval 24." in out
    assert "0.80 (time saved / model FLOPs saved); 95 % interval 0.7" in out
    layout = "1 pipe stages x 1 replicas, ZeRO 1, micro-batch 2, cpu"
    assert f"74 in {layout}; left out: 6 after a start" in out


def test_times_of_two_layouts_are_never_compared(tmp_path, capsys):
    def times(step, phase, layout):
        return (0.4, 0.6, 1.0)[phase] * (8.0 if layout == A else 1.0)

    # In A nine steps of the second phase, in B the rest.
    summary = summarise(run_dir := timed_run(tmp_path, {0: A, 29: B}, times))
    assert summary.timed.layout == B and summary.timed.elsewhere == 29
    assert [p.timing and p.timing.count for p in summary.phases] == [None, 8, 40]
    assert [p.time_ratio for p in summary.phases] == [None, pytest.approx(0.6), 1.0]
    assert (summary.saved_time, summary.efficiency, summary.time_s) == (None, None, None)
    print_summary(run_dir)
    out = " ".join(capsys.readouterr().out.split())
    assert "time saved not known: no step of small was timed in this layout" in out
    assert "saving efficiency" not in out
    write_report(run_dir)
    # In B from the middle of the first phase on: nothing of A is used.
    summary = summarise(timed_run(tmp_path / "other", {0: A, 9: B}, times))
    assert summary.saved_time == pytest.approx(0.25)
    assert [p.timing.count for p in summary.phases] == [8, 20, 40]


def test_times_that_spread_too_far_give_no_figure(tmp_path, capsys):
    # Half of the time the machine is busy with something else.
    def times(step, phase, layout):
        return (0.4, 0.6, 1.0)[phase] * (5.0 if step % 20 >= 10 else 1.0)

    summary = summarise(run_dir := timed_run(tmp_path, {0: A}, times))
    low, high = summary.saved_between
    assert high - low > summary.saved_model and not summary.saving_tells
    print_summary(run_dir)
    out = " ".join(capsys.readouterr().out.split())
    assert "measured" not in out and "efficiency" not in out
    assert f"not known: between {low:.1%} and {high:.1%}" in out
    assert "?: too few steps, or times that spread further" in out


def test_first_step_of_a_phase_is_left_out_where_it_compiles(tmp_path):
    def times(step, phase, layout):
        return 90.0 if step in (20, 40) else 1.0

    summary = summarise(timed_run(tmp_path, {0: {**A, "compile": True}}, times))
    assert [p.timing.count for p in summary.phases] == [17, 19, 39]


@pytest.mark.parametrize(
    # Ranks of the tables for the median's interval at 95 % (Conover): 6: 1 and 6, 10: 2 and 9 ...
    ("count", "low", "high"),
    [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (20, 6, 15)],
)
def test_interval_is_that_of_order_statistics(count, low, high):
    times = [float(x) for x in np.random.default_rng(count).permutation(count) + 1]
    found = timing(times)
    assert found.between_s == (low, high) and found.count == count
    assert found.median_s == (count + 1) / 2
    assert timing(times[:5]).between_s is None and timing([]) is None


def test_interval_holds_the_median_where_neighbours_are_alike():
    # 200 steps in stretches of 10 that a machine's load makes slower or faster together.
    held = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        times = np.repeat(np.exp(0.3 * draw.standard_normal(20)), 10)
        times *= np.exp(0.01 * draw.standard_normal(200))
        low, high = timing(times.tolist()).between_s
        held += low <= 1.0 <= high
    # 95 % or more; of 200, 6 deviations of 3.1 lower. By single steps it would be about half.
    assert held >= 190 - 18


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
