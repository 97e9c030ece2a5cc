"""`est-ds plan --gpu`: GPUs, hours and money."""

from __future__ import annotations

import argparse
import json
import subprocess

import pytest

from benchmarks.estimates import COMPARED, MEASURED, job, measured_steps, published_job
from cases.tiny import make_config
from conftest import ROOT
from est_ds.config.run_file import load_run
from est_ds.cost.gpus import GPUS, gpu_of
from est_ds.cost.micro_batches import divisors
from est_ds.cost.parameters import total_parameters
from est_ds.cost.peaks import PEAKS
from est_ds.cost.pipe_cuts import bubble
from est_ds.cost.time import StepSeconds, estimated, step_seconds
from est_ds.design import make_outline
from est_ds.errors import UserError
from est_ds.report.asked import Asked
from est_ds.report.hours import measured
from est_ds.report.plan_text import plan_report
from est_ds.run.step_times import StepTimes, Turns


def test_every_gpu_with_a_peak_rate_can_be_planned_for():
    assert {gpu.device for gpu in GPUS.values()} == set(PEAKS)
    for gpu in GPUS.values():
        assert gpu.peak_flops("bf16") == 1e12 * PEAKS[gpu.device].bf16
        # The network is no faster than the links of a node, and they are slower than the memory.
        assert gpu.network_bytes_s <= gpu.link_bytes_s < gpu.memory_bytes_s
        assert 16 * 2**30 < gpu.memory_bytes < 192 * 2**30


def test_an_unknown_gpu_is_named_with_its_neighbour():
    with pytest.raises(UserError, match=r"--gpu=h100 is not known; did you mean 'h100-\w+'\? "):
        gpu_of("h100")


OPTIONS = ("gpu", "count", "processes", "price", "measure", "layouts")


def options(**given) -> Asked:
    return Asked.of(argparse.Namespace(**{name: given.get(name) for name in OPTIONS}))


def test_count_is_the_number_of_processes():
    assert options(gpu="h100-80g", count=8).processes == 8


@pytest.mark.parametrize(
    "given, said",
    [
        ({"count": 8}, "--count=8 has no effect without --gpu"),
        ({"gpu": "l4", "count": 8, "processes": 4}, "--count=8 and --processes=4 differ"),
        ({"price": 2.5}, "--price=2.5 has no effect without --gpu"),
        ({"layouts": True}, "--layouts has no effect without --gpu"),
        ({"measure": True, "gpu": "l4"}, "--measure and --gpu=l4 contradict each other"),
        ({"gpu": ""}, "--gpu= is not known"),
        ({"gpu": "", "count": 8}, "--gpu= is not known"),
    ],
)
def test_an_option_that_cannot_take_effect_is_an_error(given, said):
    with pytest.raises(UserError, match=said):
        options(**given)


@pytest.mark.parametrize("run, compiled", MEASURED)
def test_steps_take_the_time_that_they_took_on_an_h200(run, compiled):
    for _, estimated_ms, measured_ms in measured_steps(run, compiled):
        assert estimated_ms == pytest.approx(measured_ms, rel=0.04)


@pytest.mark.parametrize("row", COMPARED, ids=lambda row: f"{row.model} {row.device}")
def test_other_systems_reached_the_same_within_a_quarter(row):
    run = published_job(row)
    assert total_parameters(run.pieces) == pytest.approx(row.parameters, rel=0.02)
    time = estimated(run)
    assert time.mfu(time.dense) == pytest.approx(row.mfu, rel=0.25)


TINYLLAMA = "est_tinyllama.yaml"
WIDTH = "deepspeed.communication_data_type"


def seconds_of(phase: int | None = None, count: int = 8, **parallel) -> StepSeconds:
    layout = json.dumps({"pipe": 1, "zero": 1, "processes": count, **parallel})
    return step_seconds(job("h100-80g", TINYLLAMA, f"parallel={layout}"), phase)


def test_communication_is_that_of_the_layout_and_the_links():
    assert seconds_of(count=1).links_s == 0
    one, two, three = (seconds_of(zero=zero).links_s for zero in (1, 2, 3))
    assert 0 < one < three and one < two
    # Two rings of fp32 gradients and one of bf16 weights, of seven in eight bytes.
    moved = 7 / 8 * 1_100_048_384 * (2 * 4 + 2)
    assert one == pytest.approx(moved / (0.8 * 450e9))
    # Replicas on two nodes meet over the network: nine times slower.
    assert seconds_of(count=16).links_s == pytest.approx(one * 9 * (15 / 16) / (7 / 8))
    # Of layers with half of their heads and columns, and all key/value heads, the rest is not sent;
    # ZeRO 2 reduces whole layers.
    left_out = 22 * (2048 * 2048 + 3 * 2048 * 5632 // 2)
    narrow = seconds_of(1).links_s
    assert narrow == pytest.approx(one * (1 - 8 * left_out / 10 / 1_100_048_384), rel=1e-4)
    assert seconds_of(0).links_s < 0.75 * narrow and seconds_of(1, zero=2).links_s == two
    assert seconds_of(pipe=2).links_s > 0
    layout = "parallel={pipe: 1, zero: 1, processes: 8}"
    half = [
        step_seconds(job("h100-80g", TINYLLAMA, layout, f"{WIDTH}={of}"), None)
        for of in ("fp16", "bf16", "fp32")
    ]
    assert half[0] == half[1] and half[0].links_s < half[2].links_s


def test_pipe_stages_wait_at_least_for_the_bubble():
    config = load_run(ROOT / "configs" / "run" / TINYLLAMA, [])
    accumulation = config.batch.global_ // config.batch.micro // 4
    piped = seconds_of(pipe=2)
    share = piped.waiting_s / (piped.compute_s + piped.waiting_s)
    assert bubble(2, accumulation) < share < bubble(2, accumulation) + 0.1
    assert seconds_of().waiting_s == 0


def test_checkpointing_costs_a_forward():
    plain = job("h100-80g", TINYLLAMA)
    again = job("h100-80g", TINYLLAMA, "activation_checkpointing=true")
    ratio = step_seconds(again, None).compute_s / step_seconds(plain, None).compute_s
    assert 1.25 < ratio < 4 / 3


@pytest.mark.parametrize(
    "run, change, said",
    [
        ("est_gpt2.yaml", "model={model_type: mamba}", "its scan is no matrix product"),
        (TINYLLAMA, "parallel={pipe: 1, zero: 2, offload: true}", "offload=True is not estimated"),
    ],
)
def test_what_cannot_be_estimated_says_so(run, change, said):
    with pytest.raises(UserError, match=said):
        job("h100-80g", run, change, "method={name: full}")


def planned(**more) -> dict:
    config = load_run(ROOT / "configs" / "run" / TINYLLAMA, ["parallel.processes=8"])
    asked = Asked(gpu=gpu_of("h100-80g"), processes=8, **more)
    return json.loads(plan_report(config, as_json=True, asked=asked))


def test_json_has_hours_and_money_of_the_run_and_of_its_dense_twin():
    plan = planned(price=2.5)
    time, cost = plan["time"], plan["cost"]
    hours = sum(phase["steps"] * phase["step_s"] for phase in time["phases"]) / 3600
    assert time["hours"] == pytest.approx(hours)
    assert time["dense_hours"] == pytest.approx(24_000 * time["dense_step_s"] / 3600)
    assert time["gpu_hours"] == pytest.approx(8 * hours)
    assert time["saved"] == pytest.approx(1 - hours / time["dense_hours"])
    assert 0 < time["saved"] < plan["saved"]["model"], "FLOPs saved are not all seconds"
    assert cost["run"] == pytest.approx(2.5 * 8 * hours)
    assert cost["saved"] == pytest.approx(cost["dense"] - cost["run"])
    for phase in time["phases"]:
        parts = ("compute_s", "waiting_s", "links_s", "optimizer_s")
        assert phase["step_s"] == pytest.approx(sum(phase[part] for part in parts))
    assert time["phases"][-1]["ratio"] == pytest.approx(1.0) and not time["measured"]
    assert "layouts" not in plan and "cost" not in planned()


def test_layouts_are_sorted_and_every_one_has_the_runs_batch():
    layouts = planned(layouts=True)["layouts"]
    assert {row["pipe"] for row in layouts} == {1, 2, 4}, "eight stages would cut bands"
    assert [row["hours"] for row in layouts] == sorted(row["hours"] for row in layouts)
    for row in layouts:
        assert row["pipe"] * row["data"] == 8 and row["zero"] in (1, 2, 3)
        assert row["micro"] * row["accumulation"] * row["data"] == 1024
    # A larger micro-batch is faster and takes more memory; not all fit.
    one = [row for row in layouts if row["pipe"] == 1 and row["zero"] == 1]
    assert [row["micro"] for row in one] == sorted((row["micro"] for row in one), reverse=True)
    assert {row["fits"] for row in one} == {True, False}


def test_text_names_the_fastest_layout_in_80_columns():
    config = load_run(ROOT / "configs" / "run" / TINYLLAMA, ["parallel.processes=8"])
    asked = Asked(gpu=gpu_of("h100-80g"), price=2.5, layouts=True)
    text = plan_report(config, as_json=False, asked=asked)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "8 x h100-80g" in text and "at 2.5 a GPU-hour" in text
    assert "MFU 0.418 of MPT-1B on H100" in text
    assert "The fastest: parallel.pipe=1 parallel.zero=1 batch.micro=" in text


def words_of(run: str, *overrides: str, **asked) -> str:
    """What a plan on l4 says, on one line."""
    config = load_run(ROOT / "configs" / "run" / run, list(overrides))
    text = plan_report(config, as_json=False, asked=Asked(gpu=gpu_of("l4"), **asked))
    assert max(map(len, text.splitlines())) <= 80
    return " ".join(text.split())


def test_little_money_and_narrow_tables_are_said_whole():
    """200 toy steps of some milliseconds, whose phases keep their names in one piece."""
    config = load_run(ROOT / "configs" / "run" / "quickstart.yaml", [])
    asked = Asked(gpu=gpu_of("l4"), price=2.5)
    cost = json.loads(plan_report(config, as_json=True, asked=asked))["cost"]
    said = words_of("quickstart.yaml", price=2.5)
    assert 0 < cost["run"] < cost["dense"] < 0.1
    assert f"money {cost['run']:.3g} at 2.5 a GPU-hour; dense training {cost['dense']:.3g}" in said
    assert f"{cost['saved']:.3g} more" in said and "0.00 GPU-hours" not in said
    assert "activ- " in said and "ations" in said and " narrow " in said.split("MFU waiting")[1]


def test_long_runs_are_said_in_whole_hours_and_their_heads_in_one_piece():
    config = load_run(ROOT / "configs" / "run" / TINYLLAMA, ["tokens=3e12"])
    asked = Asked(gpu=gpu_of("l4"), layouts=True)
    time = json.loads(plan_report(config, as_json=True, asked=asked))["time"]
    said = words_of(TINYLLAMA, "tokens=3e12", layouts=True)
    assert time["dense_hours"] > 1000 and f" {time['dense_hours']:,.0f} An estimate" in said
    assert " of 22 of 32 of 5,632 " in said and "e+0" not in said.partition("MFU waiting")[2]


def test_a_run_that_takes_longer_than_its_dense_twin_costs_more():
    skips = "method={name: layer_drop, drop: 0.01}"
    layout = "parallel={pipe: 1, zero: 3, processes: 64}"
    dear = words_of(TINYLLAMA, skips, layout, "batch={global: 64, micro: 1}", price=1.0)
    assert "time saved -" in dear and " less " in dear.partition("dense training")[2]


def test_where_no_layout_fits_the_room_is_what_a_process_can_use():
    wide = ("model.num_hidden_layers=44", "method={name: full}")
    said = words_of(TINYLLAMA, "parallel.processes=2", *wide, layouts=True)
    assert "of 19.4 GiB. Take more GPUs, or larger ones, or set activation_ch" in said
    again = words_of(
        TINYLLAMA, "parallel.processes=2", *wide, "activation_checkpointing=true", layouts=True
    )
    assert "of 19.4 GiB. Take more GPUs, or larger ones." in again


def test_published_utilisation_is_of_bf16():
    for precision, shown in (("bf16", True), ("fp32", False)):
        config = load_run(ROOT / "configs" / "run" / TINYLLAMA, [f"precision={precision}"])
        asked = Asked(gpu=gpu_of("h100-80g"))
        assert ("published" in plan_report(config, as_json=False, asked=asked)) == shown


def test_divisors_of_a_batch_of_any_size():
    for number in range(1, 400):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
    assert len(divisors(10**11)) == 12**2, "of 2**11 x 5**11"


def test_measured_steps_give_the_hours_of_the_phases():
    """Medians of 1 s, 2 s and 4 s (full) of 5 and 15 steps of the tiny run."""
    outline = make_outline(make_config())
    turns = (
        Turns(run="run", name="full", phase=1, num_steps=15, wall_s=(4.0, 4.0), cpu_s=(1, 1)),
        Turns(run="run", name="small", phase=0, num_steps=5, wall_s=(1.0, 3.0), cpu_s=(1, 1)),
    )
    layout = {"pipe": 1, "replicas": 2, "device": "cpu"}
    times = StepTimes(turns=turns, processors=2, others=0.0, layout=layout)
    time = measured(outline, times)
    assert [(p.name, p.step_s) for p in time.phases] == [("small", 2.0), ("full", 4.0)]
    assert (time.total_s, time.dense_s, time.processes) == (70.0, 80.0, 2)
    text = plan_report(outline.config, as_json=False, asked=Asked(times=times))
    assert "2 x cpu" in text and "12.50% (1.143x)" in text and "Measured here" in text
    for others, busy in ((0.1, False), (0.5, True)):  # a tenth of two processors, and more
        asked = Asked(times=times.model_copy(update={"others": others}))
        words = f"{'busy in these rounds' if busy else 'quiet'}: other processes used {others}"
        assert words in plan_report(outline.config, as_json=False, asked=asked)
        said = json.loads(plan_report(outline.config, as_json=True, asked=asked))
        assert said["time"]["busy"] is busy


@pytest.mark.slow
def test_measure_trains_some_steps_of_every_phase_here(synthetic_run, tmp_path):
    call = ["est-ds", "plan", str(synthetic_run), f"run_dir={tmp_path}/run", "--measure", "--json"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["time"]["measured"] and plan["time"]["hours"] > 0
    assert [p["name"] for p in plan["time"]["phases"]] == [p["name"] for p in plan["phases"]]
    assert not (tmp_path / "run").exists()
