"""`batch.micro: auto`: the largest micro-batch that divides the batch and fits."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from cases.tiny import make_config
from conftest import est_ds, refused
from est_ds.config.run_file import load_run
from est_ds.cost.gpus import gpu_of
from est_ds.cost.micro_batches import micro_batches
from est_ds.errors import UserError
from est_ds.launch.placement import this_machine
from est_ds.ranks.preempt import EXIT_CODE
from est_ds.report.asked import Asked
from est_ds.report.plan_text import plan_report
from est_ds.run.directory import write_config
from est_ds.run.metrics import read_metrics
from est_ds.training import micro_batch
from est_ds.training.micro_batch import expected_bytes, find_micro, first_that_fits
from est_ds.verify_resume.short import shortened

AUTO = "batch.micro=auto"
ALONE = "parallel={pipe: 1, zero: 1, processes: 1}"


@pytest.mark.parametrize(
    ("size", "changes", "processes", "expected"),
    [
        (48, {}, 2, [24, 12, 8, 6, 4, 3, 2, 1]),
        (7, {}, 1, [7, 1]),
        (64, {"parallel": {"pipe": 2}}, 2, [8, 4, 2, 1]),
        (64, {"parallel": {"pipe": 2}}, 8, [2, 1]),
        (4, {"parallel": {"pipe": 2}}, 2, [1]),  # fewer micro-batches than four a stage
        (8, {"method": {"name": "full", "draw": "micro_batch"}}, 1, [4, 2, 1]),
        (8, {"method": {"name": "full", "draw": "micro_batch"}}, 2, [4, 2, 1]),
    ],
)
def test_sizes_divide_a_replicas_share_and_keep_a_pipeline_busy(size, changes, processes, expected):
    config = make_config(batch={"global": size, "micro": "auto"}, **changes)
    assert micro_batches(config, processes) == expected
    for micro in expected:
        config.with_micro(micro).batch.accumulation(config.data_parallel(processes))


def test_processes_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(UserError, match="batch.global=8 is not a multiple of"):
        micro_batches(make_config(batch={"global": 8, "micro": "auto"}), 3)


def test_without_gpus_the_estimate_against_the_memory_decides(tiny_run, tmp_path, monkeypatch):
    overrides = [f"run_dir={tmp_path}/run", AUTO, ALONE]
    config, where = load_run(tiny_run, overrides), SimpleNamespace(by_ssh=False, node_rank=None)
    for processes in (1, 2):
        where.processes, needs = processes, expected_bytes(config, processes)
        for micro in (1, 2, 4):
            room = (needs(micro) + 1) * processes / micro_batch.SHARE
            monkeypatch.setattr(micro_batch, "memory_bytes", lambda room=room: room)
            assert find_micro(str(tiny_run), overrides, where) == micro
    monkeypatch.setattr(micro_batch, "memory_bytes", lambda: 1e6)
    with pytest.raises(UserError, match="batch.micro=auto: 1 needs .* activation_checkpointing"):
        find_micro(str(tiny_run), overrides, where)
    for several in ({"by_ssh": True, "node_rank": None}, {"by_ssh": False, "node_rank": 1}):
        with pytest.raises(UserError, match="works on one machine; give a number"):
            find_micro(str(tiny_run), overrides, SimpleNamespace(processes=2, **several))


def test_on_gpus_the_estimate_says_where_trials_begin(tiny_run, tmp_path, monkeypatch):
    overrides = [f"run_dir={tmp_path}/run", AUTO, ALONE]
    config = load_run(tiny_run, overrides)
    where = SimpleNamespace(by_ssh=False, node_rank=None, processes=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    needs, tried = expected_bytes(config, 1), []
    for room, expected in ((1e12, [8, 4, 2, 1]), (needs(4), [4, 2, 1]), (1e3, [1])):
        # The smaller of two GPUs, of which a part is left.
        sizes = {0: 1e13, 1: room / micro_batch.GPU_SHARE + 1}
        monkeypatch.setattr(micro_batch, "_gpu_bytes", sizes.__getitem__)
        monkeypatch.setattr(micro_batch, "first_that_fits", lambda m, *_: tried.append(m) or m[-1])
        assert find_micro(str(tiny_run), overrides, where) == 1 and tried.pop() == expected
    monkeypatch.setattr(micro_batch, "first_that_fits", lambda *_: None)
    with pytest.raises(UserError, match="a micro-batch of 1 does not fit into a GPU of"):
        find_micro(str(tiny_run), overrides, where)


def test_a_run_that_has_begun_keeps_what_was_found(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    overrides = [f"run_dir={run_dir}", AUTO]
    assert load_run(tiny_run, overrides).batch.is_auto
    write_config(load_run(tiny_run, [f"run_dir={run_dir}", "batch.micro=4"]))
    for found in (load_run(tiny_run, overrides), load_run(run_dir, [AUTO]), load_run(run_dir)):
        assert found.batch.micro == 4 and not found.batch.is_auto
    assert load_run(tiny_run, [*overrides, "batch.micro=1"]).batch.micro == 1


def test_only_what_starts_the_processes_finds_it(tiny_run, tmp_path, monkeypatch):
    given = (tiny_run, f"run_dir={tmp_path}/run", AUTO)
    shown = est_ds("plan", *given).stdout
    assert "micro_batch 1 x" in shown and "batch.micro=auto: est-ds train takes" in shown
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    launched = est_ds("train", *given, ALONE)
    assert launched.returncode == 2 and "give a number here" in launched.stderr


def test_training_begins_with_what_fits_and_its_config_says_so(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    done = est_ds(
        "train", tiny_run, f"run_dir={run_dir}", AUTO, ALONE, "steps=2", "method.name=full"
    )
    assert done.returncode == 0, done.stderr
    assert "batch.micro=auto: 8, estimated at" in done.stdout
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["batch"]["micro"] == 8
    assert "micro_batch 8 x accumulation 1" in done.stdout
    [step, _], _ = read_metrics(run_dir)
    assert step["layout"]["micro"] == 8


def test_a_lack_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert micro_batch._is_lack_of_memory(caught.value)
    for said in ("CUDA out of memory. Tried to allocate 2 GiB", "no more is said"):
        assert micro_batch._is_lack_of_memory(torch.cuda.OutOfMemoryError(said))
    for said in (
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
    ):
        assert micro_batch._is_lack_of_memory(RuntimeError(said))
    assert not micro_batch._is_lack_of_memory(ValueError("no such layer"))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, EXIT_CODE), (signal.SIGINT, 128 + signal.SIGINT)]
)
def test_a_signal_ends_a_trial_and_no_training_begins(number, code, tiny_run, tmp_path, capfd):
    overrides = [f"run_dir={tmp_path}/run", ALONE]
    where = this_machine(load_run(tiny_run, overrides), 1)
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    with pytest.raises(SystemExit) as ended:
        first_that_fits([2, 1], [str(tiny_run), *overrides], where)
    assert ended.value.code == code
    assert capfd.readouterr().out.count("batch.micro=auto: trying") == 1


def test_what_is_wrong_is_said_before_a_trial(tiny_run, tmp_path, capsys):
    given = ("train", tiny_run, f"run_dir={tmp_path}/run", AUTO, ALONE)
    assert "corpus absent" in refused(capsys, *given, "data.train=absent")
    (tmp_path / "run").write_text("")
    assert "run_dir" in refused(capsys, *given)


def test_measuring_and_verifying_need_a_number(tiny_run, tmp_path, capsys):
    given = (tiny_run, f"run_dir={tmp_path}/run", AUTO)
    needs = "batch.micro=auto: {} needs a number; add batch.micro=N."
    assert needs.format("--measure") in refused(capsys, "plan", *given, "--measure")
    with pytest.raises(UserError, match=re.escape(needs.format("verify-resume"))):
        shortened(load_run(tiny_run, list(given[1:])), None)


DROPPING = {
    "model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64,
    "vocab_size": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "largest"),
    [
        ({"method": {"name": "full"}, "model": DROPPING}, 16),
        ({"method": {"name": "layer_drop", "drop": 0.2, "draw": "micro_batch"}}, 8),
        ({"parallel": {"pipe": 2, "zero": 1, "processes": 2}}, 2),
    ],
)
def test_the_plan_for_a_gpu_is_of_the_micro_batch_that_auto_takes(changes, largest):
    """On a GPU that holds all of them: the rules are the same."""
    config = make_config(batch={"global": 16, "micro": "auto"}, precision="bf16", **changes)
    processes = config.parallel.processes or 1
    asked = Asked(gpu=gpu_of("h100-80g"), processes=processes, layouts=True)
    plan = json.loads(plan_report(config, True, asked=asked))
    assert plan["micro"] == "auto" and plan["figures_for_micro"] == largest
    assert plan["memory"]["largest_micro"] == largest == micro_batches(config, processes)[0]
    found = {layout["micro"] for layout in plan["layouts"] if layout["pipe"] == 1}
    assert {1, largest} < found
    given = json.loads(plan_report(config.with_micro(largest), True, asked=asked))
    assert given["time"] == plan["time"] and "micro" not in given
    text = " ".join(plan_report(config, False, asked=asked).split())
    assert f"micro_batch {largest} x" in text and f"the figures are for {largest}" in text
    assert "the figures are for 1 " in " ".join(plan_report(config, False).split())


@pytest.mark.slow
def test_a_trial_says_whether_a_micro_batch_fits(tiny_run, tmp_path):
    """As on GPUs, but that a limit of this process and its children stands for a GPU's memory. The
    largest tensor, which is refused at once, would be of 52 GB."""
    overrides = [f"run_dir={tmp_path}/run", "parallel={pipe: 1, zero: 1, processes: 2}"]
    where = this_machine(load_run(tiny_run, overrides), 2)
    wide = ["method={name: full}", "model.num_hidden_layers=1", "model.intermediate_size=200000"]
    given = [str(tiny_run), *overrides, "batch.global=2048", *wide]
    assert first_that_fits([2], given, where) == 2
    assert not Path(tmp_path, "run").exists()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (40 << 30, hard))
    try:
        assert first_that_fits([1024], given, where) is None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    with pytest.raises(UserError, match="corpus absent: absent.idx does not exist"):
        first_that_fits([2], [*given, "data.train=absent"], where)


@pytest.mark.gpu
def test_the_largest_micro_batch_that_a_gpu_takes_trains(tiny_run, tmp_path):
    """A sequence so wide that a GPU cannot hold the whole batch at once."""
    size = "{model_type: llama, vocab_size: 512, hidden_size: 2048, num_hidden_layers: 8, "
    size += "num_attention_heads: 16, intermediate_size: 8192, max_position_embeddings: 64}"
    given = (tiny_run, f"run_dir={tmp_path}/run", AUTO, ALONE, f"model={size}", "method.name=full")
    done = est_ds("train", *given, "batch.global=2048", "steps=2", timeout=900)
    assert done.returncode == 0, done.stderr
    micro = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["batch"]["micro"]
    assert 1 < micro < 2048 and done.stdout.count("batch.micro=auto: trying") >= 1
