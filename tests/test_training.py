"""Training through the real launcher."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import accumulate

import numpy as np
import pytest
import torch

from conftest import est_ds, tensorboard_points, train
from est_ds.checkpoints.index import read_index
from est_ds.checkpoints.store import Store
from est_ds.config.run_file import load_run
from est_ds.design import make_design
from est_ds.run.directory import check_run_dir, write_config
from est_ds.run.metrics import read_metrics
from est_ds.run.prepare import prepare
from reference import assert_close, plain_adamw


@pytest.fixture(scope="session")
def reference(tiny_run, tmp_path_factory):
    """The tiny run in one process of plain torch."""
    folder = tmp_path_factory.mktemp("reference")
    return plain_adamw(load_run(tiny_run, [f"run_dir={folder}/run", "parallel={}"]))


def test_the_launched_run_equals_plain_adamw(trained, reference):
    steps, evaluations = read_metrics(trained)
    assert_close([e["loss"] for e in steps], reference.losses)
    assert_close([e["grad_norm"] for e in steps], reference.norms, within=1e-4)
    assert_close([e["eval_loss"] for e in evaluations], list(reference.held_out.values()))


@pytest.mark.parametrize("zero", [0, 1])
def test_tied_embedding_in_a_pipeline_equals_one_process(zero, tiny_run, tmp_path):
    dropout = "attn_pdrop: 0.0, embd_pdrop: 0.0, resid_pdrop: 0.0"
    size = "n_embd: 64, n_head: 8, n_layer: 4, n_positions: 64, vocab_size: 512"
    model = f"{{model_type: gpt2, {size}, {dropout}}}"
    losses, norms = [], []
    for pipe in (1, 2):
        run_dir = tmp_path / f"run{pipe}"
        done = train(
            tiny_run,
            f"run_dir={run_dir}",
            f"model={model}",
            f"parallel.pipe={pipe}",
            f"parallel.zero={zero}",
            processes=pipe,
        )
        assert done.returncode == 0, done.stderr
        steps, _ = read_metrics(run_dir)
        losses.append([e["loss"] for e in steps])
        norms.append([e["grad_norm"] for e in steps])
    assert_close(losses[1], losses[0])
    assert_close(norms[1], norms[0], within=1e-4)


def test_stopped_and_resumed_run_equals_the_run_that_never_stopped(trained, tmp_path):
    # Back to the checkpoint inside phase 1, as if the node had been lost before the next one.
    run_dir = shutil.copytree(trained, tmp_path / "run")
    (run_dir / "checkpoints" / "latest").write_text("step_00000005\n")
    again = train(run_dir, processes=4)
    assert again.returncode == 0, again.stderr
    assert "resuming at step 5 of 20" in again.stdout
    kept = ("step", "loss", "grad_norm", "lr", "tokens", "plan_digest", "data_digest")
    steps, evaluations = read_metrics(run_dir)
    expected_steps, expected_evaluations = read_metrics(trained)
    assert [[e[k] for k in kept] for e in steps] == [[e[k] for k in kept] for e in expected_steps]
    assert evaluations == expected_evaluations
    # What it trains anew it has said before; TensorBoard shows every step once all the same.
    points = tensorboard_points(run_dir)
    assert points == tensorboard_points(trained)
    assert {steps[i]["start"] for i in range(5)} == {0}
    assert {steps[i]["start"] for i in range(5, 20)} == {5}
    for run, lines in ((trained, expected_steps), (run_dir, steps)):
        seconds = list(accumulate(e["step_s"] for e in lines))
        assert [e["trained_s"] for e in lines] == pytest.approx(seconds, rel=1e-12)
        store = Store(run / "checkpoints")
        saved = {step: read_index(store.path(step)).state.trained_s for step in (5, 10, 20)}
        assert saved == {step: lines[step - 1]["trained_s"] for step in saved}
        assert not {"mfu", "mfu_dense", "memory_peak_bytes"} & set(lines[-1])  # of GPUs
    assert steps[4] == expected_steps[4] and steps[5] != expected_steps[5]


def test_trackers_have_every_figure_once_over_steps_done(trained):
    points = tensorboard_points(trained)
    of_model = ("loss", "bits_per_byte", "layers")
    assert [points.pop(f"eval/{name}") for name in of_model] == [[10, 20]] * 3
    lines, _ = read_metrics(trained)
    ends = {f"train/{n}": [8, 14, 20] for n in ("pipe_imbalance", "pipe_waiting")}
    numbers = {k for k, v in lines[0].items() if isinstance(v, (int, float))} - {"step", "start"}
    shown = {f"train/{name}": list(range(1, 21)) for name in numbers | {"phase", "flops_ratio"}}
    assert points == shown | ends


def test_lines_say_what_their_numbers_are_of(trained, corpus):
    steps, evaluations = read_metrics(trained)
    layout = {"pipe": 2, "zero": 1, "replicas": 2, "micro": 2, "device": "cpu", "cuts": [2, 4]}
    assert all(e["layout"] == layout and e["start"] == 0 for e in steps)
    assert [e["eval_layers"] for e in evaluations] == [4, 4]
    documents = [json.loads(line) for line in (corpus / "text.valid.jsonl").open()]
    text_bytes = sum(len(document["text"].encode()) for document in documents)
    tokens = np.fromfile(corpus / "valid.bin", np.uint16).size
    for line in evaluations:
        bits = line["eval_loss"] / np.log(2) * tokens / text_bytes
        assert line["eval_bits_per_byte"] == pytest.approx(bits)
    last = f"{evaluations[-1]['eval_loss']:.4f} ({bits:.4f} bits per byte)"
    said = (trained / "stdout.txt").read_text()
    assert f"step 20: held-out loss of the full model {last}" in said
    num_samples = (np.fromfile(corpus / "train.bin", np.uint16).size - 1) // 64
    assert f"corpus {corpus}/train: {20 * 8 / num_samples:.3g} epochs" in said


def test_held_out_sequences_of_a_run_are_chosen_as_it_began(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    as_file = [f"run_dir={run_dir}"]
    assert load_run(tiny_run, as_file).evaluate.choice == "even"
    assert load_run(tiny_run, [*as_file, "evaluate.choice=first"]).evaluate.choice == "first"
    write_config(load_run(tiny_run, as_file))
    assert load_run(tiny_run, as_file).evaluate.choice == "even"
    # As a run that began before the field was there.
    config = run_dir / "config.yaml"
    config.write_text("".join(x for x in config.open() if not x.startswith("  choice: ")))
    (run_dir / "metrics.jsonl").write_text("")
    for resumed in (load_run(tiny_run, as_file), load_run(run_dir)):
        assert resumed.evaluate.choice == "first"
        check_run_dir(resumed)
    assert load_run(run_dir, ["evaluate.choice=even"]).evaluate.choice == "even"


def test_run_directory_holds_what_the_contract_says(trained):
    assert (trained / "config.yaml").is_file()
    assert (trained / "checkpoints" / "latest").read_text() == "step_00000020\n"
    assert list((trained / "tensorboard").glob("events.out.tfevents.*"))
    steps, _ = read_metrics(trained)
    assert [e["step"] for e in steps] == list(range(20))
    assert set(steps[0]) >= {
        *("step", "phase", "loss", "lr", "grad_norm", "tokens", "step_s", "tokens_per_s"),
        *("clipped", "step_cpu_s"),
        *("flops_active", "flops_dense", "kept_layers", "plan_digest", "data_digest"),
    }
    assert steps[-1]["tokens"] == 20 * 8 * 64
    assert [e["kept_layers"] for e in steps] == [2] * 8 + [4] * 12
    tags = sorted(p.name for p in (trained / "checkpoints").glob("step_*"))
    assert tags == [f"step_{n:08d}" for n in (5, 8, 10, 14, 15, 20)]
    index = json.loads((trained / "checkpoints" / tags[0] / "checkpoint.json").read_text())
    assert index["layout"] == {"pipe": 2, "zero": 1, "replicas": 2}
    assert not list(trained.rglob("*.partial"))


def test_only_rank_0_speaks_and_only_to_the_point(trained):
    assert (trained / "stderr.txt").read_text() == ""
    lines = (trained / "stdout.txt").read_text().splitlines()
    assert "4 processes = 2 pipe stages x 2 replicas" in lines[0]
    assert "global_batch 8 = micro_batch 2 x accumulation 2 x data_parallel 2" in lines[1]
    assert len([line for line in lines if line.startswith("step 1/20")]) == 1
    for phase in ("small", "narrow", "full"):
        [line] = [line for line in lines if line.startswith(f"phase {phase}: pipe stages compute")]
        busy = [float(word) for word in line.split("compute ")[1].split(" of ")[0].split()]
        assert len(busy) == 2 and all(0 < share < 1 for share in busy)
        assert "bubble alone 0.33" in line


def test_finished_run_is_not_trained_over(trained):
    before = (trained / "metrics.jsonl").read_bytes()
    again = est_ds("train", trained)
    assert again.returncode == 0
    assert "all 20 steps are behind it" in again.stdout
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_export_is_the_trained_model(trained, reference, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = est_ds("export", trained, "--out", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert "largest difference of logits, reloaded folder against the engine's weights: 0\n" in (
        done.stdout
    )
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    for name, weight in reference.model.state_dict().items():
        torch.testing.assert_close(exported[name], weight, rtol=1e-3, atol=1e-4)
    # Its config.json is a model section as it is, and a run may begin with its weights.
    again = make_design(load_run(trained, [f"model={tmp_path / 'hf'}"]))
    assert again.method.shape == make_design(load_run(trained)).method.shape
    begun = load_run(trained, [f"model.from={tmp_path / 'hf'}", f"run_dir={tmp_path / 'next'}"])
    weights = prepare(begun, 4).weights()
    for name in weights.names:
        flat = exported[name].flatten()
        assert torch.equal(weights.read(name, "weight", 0, len(flat)), flat)
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")("def f():\n    return 1\n")["input_ids"]
    assert len(ids) > 4


def test_export_replaces_only_an_export(trained, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "hf" / "thesis.txt").write_text("precious")
    done = est_ds("export", trained, "--out", tmp_path / "hf")
    assert done.returncode == 2 and "is no export" in done.stderr
    assert (tmp_path / "hf" / "thesis.txt").exists()


@pytest.mark.parametrize(
    "number",
    [
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP)),
        signal.SIGKILL,
    ],
)
def test_ending_est_ds_ends_every_process(number, tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "est_ds.cli", "train", str(tiny_run), f"run_dir={run_dir}"]
    log = (tmp_path / "log").open("w")
    # Under nohup the tests ignore SIGHUP, which would be inherited.
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    more = ["evaluate.every=1", "parallel.processes=2"]
    started = subprocess.Popen([*command, *more], stdout=log, stderr=log)
    signal.signal(signal.SIGHUP, former)
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text())
    started.send_signal(number)
    expected = -number if number == signal.SIGKILL else 128 + number
    assert started.wait(30) == expected
    wait_until(
        lambda: not subprocess.run(["pgrep", "-f", str(run_dir)], capture_output=True).stdout
    )
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said or number == signal.SIGKILL
    # Nothing of what DeepSpeed and its launcher say of themselves.
    assert not re.search(r"^\[\d{4}-", said, flags=re.MULTILINE) and "step 1/20" in said


def wait_until(true, limit_s: float = 90) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)
