"""The Hessian's products, trace and largest eigenvalue against Hessians that are built whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import psutil
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from conftest import ROOT, refused
from est_ds import cli
from est_ds.analysis.hessian import (
    Effort,
    _in_processes,
    largest_eigenvalue,
    measure_hessian,
    one_sample,
    peak_bytes,
)
from est_ds.analysis.product import Hessian, flat, groups_of
from est_ds.analysis.subject import Wanted, open_subject
from est_ds.checkpoints.weights import with_weights
from est_ds.config.run_file import load_run
from est_ds.run.metrics import read_metrics
from pages import Page
from subjects import GPT2, LLAMA, subject_of

SAMPLES = 120


@pytest.fixture(
    scope="module",
    params=[LLAMA | {"num_hidden_layers": 1}, GPT2 | {"n_layer": 1}],
    ids=["llama", "gpt2, tied"],
)
def known(request):
    """A model, and its Hessian built row by row from the library's model and loss."""
    subject = subject_of(request.param)
    model = subject.model
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def loss(values):
        parts = [part.view(shape) for part, shape in zip(values.split(sizes), shapes)]
        total = 0.0
        for batch in subject.batches:
            weights = dict(zip(names, parts))
            logits = functional_call(model, weights, kwargs=batch.named).logits
            total += cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        return total / len(subject.batches)

    values = torch.from_numpy(flat(list(model.parameters()))).requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        [gradient] = torch.autograd.grad(loss(values), values, create_graph=True)
        rows = [torch.autograd.grad(g, values, retain_graph=True)[0] for g in gradient]
    whole = torch.stack(rows).double().numpy()
    assert abs(whole - whole.T).max() < 1e-4 * abs(whole).max()
    return subject, Hessian(subject), whole


def test_a_product_is_the_whole_hessian_times_the_vector(known):
    _, hessian, whole = known
    signs = hessian.signs(0, 3)
    expected = whole @ flat(signs).astype(float)
    assert abs(flat(hessian.times(signs)) - expected).max() < 1e-5 * abs(expected).max()


def test_the_trace_lies_within_its_stated_error_in_all_and_by_layer(known):
    subject, hessian, whole = known
    groups = groups_of(subject.design, subject.model)
    assert sorted(sum(groups.values(), [])) == list(range(len(hessian.parameters)))
    samples = np.array([one_sample(hessian, list(groups.values()), 0, i) for i in range(SAMPLES)])
    ends = np.cumsum([0] + [p.numel() for p in hessian.parameters])
    for column, places in enumerate(groups.values()):
        exact = sum(np.trace(whole[a:b, a:b]) for a, b in ((ends[i], ends[i + 1]) for i in places))
        error = samples[:, column].std(ddof=1) / SAMPLES**0.5
        assert abs(samples[:, column].mean() - exact) < 3.5 * error
    total = samples.sum(1)
    error = total.std(ddof=1) / SAMPLES**0.5
    assert abs(total.mean() - np.trace(whole)) < 3.5 * error
    # The variance of a sample of signs is twice the sum of squares off the diagonal.
    off = (whole**2).sum() - (np.diag(whole) ** 2).sum()
    assert error == pytest.approx((2 * off / SAMPLES) ** 0.5, rel=0.25)


def test_the_largest_eigenvalue_is_that_of_the_whole_hessian(known):
    _, hessian, whole = known
    exact = np.linalg.eigvalsh(whole)[-1]
    assert largest_eigenvalue(hessian) == pytest.approx(exact, rel=2e-3)


def test_vectors_are_even_signs_of_seed_and_sample_alone(known):
    _, hessian, _ = known
    signs = flat(hessian.signs(0, 0))
    assert set(signs) == {-1.0, 1.0} and abs(signs.mean()) < 4 / len(signs) ** 0.5
    assert np.array_equal(signs, flat(hessian.signs(0, 0)))
    for other in (flat(hessian.signs(0, 1)), flat(hessian.signs(1, 0))):
        assert abs((signs * other).mean()) < 4 / len(signs) ** 0.5


def test_a_tied_parameter_of_a_checkpoint_counts_once():
    subject = subject_of(GPT2)
    weights = {name: p.clone() for name, p in subject.model.state_dict().items()}
    model = with_weights(subject.design.hf_config, weights)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p.numel() for p in model.parameters()) == subject.num_parameters


# runs


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_the_loss_at_a_checkpoint_is_the_one_that_the_run_reported(trained):
    subject = open_subject(Wanted(str(trained), windows=10))
    reported = read_metrics(trained)[1][-1]
    assert subject.step == reported["step"] + 1 == 20
    assert subject.held_out_loss() == pytest.approx(reported["eval_loss"], rel=1e-5)


def test_command_writes_numbers_and_a_figure_that_the_report_shows(run, capsys):
    few = ("--samples", "12", "--windows", "1", "--error", "0.5")
    cli.main(["analyse", "hessian", str(run), "--step", "10", "--json", *few])
    said = json.loads(capsys.readouterr().out)
    folder = run / "analysis"
    assert said == json.loads((folder / "hessian_step_00000010.json").read_text())
    assert (folder / "hessian_step_00000010.png").read_bytes().startswith(b"\x89PNG")
    assert 10 <= said["samples"] <= 12 and said["reached"] == (
        said["standard_error"] <= 0.5 * abs(said["trace"])
    )
    by_layer = said["by_layer"]
    assert list(by_layer) == ["embeddings", *(f"layer {i}" for i in range(4)), "output"]
    assert sum(g["trace"] for g in by_layer.values()) == pytest.approx(said["trace"])
    assert sum(g["parameters"] for g in by_layer.values()) == said["parameters"]
    assert said["memory"]["vectors_bytes"] == 16 * said["parameters"]
    assert said["largest_eigenvalue"] > 0
    cli.main(["report", str(run)])
    page = Page((run / "report.html").read_text())
    assert "Analyses" in page.headings and said["said"][0] in page.text


GIB = 2**30
# A process that holds a GiB starts a command, and reads what Linux says of it to the end.
LARGE = """
import json, subprocess, sys, time
held = b"x" * 2**30
asked = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
file, peak = open(f"/proc/{asked.pid}/status"), 0
while asked.poll() is None:
    file.seek(0)
    peak = int((file.read().partition("VmHWM:")[2].split() or [peak])[0])
    time.sleep(0.01)
print(json.dumps([1024 * peak, json.loads(asked.stdout.read())["memory"]["peak_bytes"]]))
"""


def test_memory_is_of_the_process_and_not_of_the_one_that_started_it(run):
    command = [sys.executable, "-m", "est_ds.cli", "analyse", "hessian", str(run), "--json"]
    few = ["--samples", "2", "--windows", "1", "--skip-eigenvalue"]
    large = [sys.executable, "-c", LARGE, *command, *few]
    done = subprocess.run(large, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    read, said = json.loads(done.stdout)
    assert said == pytest.approx(read, rel=0.05) and said < GIB


@pytest.mark.slow
def test_memory_of_the_processes_of_samples_is_their_own(trained):
    held = b"x" * GIB
    with closing(_in_processes(Wanted(str(trained), windows=1), [[0]], Effort(2, 0.5, 2))) as found:
        peaks = [peak for _, peak in found]
    assert len(peaks) == 2 and max(peaks) < len(held) < peak_bytes()


def test_along_a_run_every_checkpoint_is_measured_with_the_same_vectors(run, capsys):
    few = ("--samples", "2", "--windows", "1", "--skip-eigenvalue")
    for step in (5, 8, 14, 15):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    cli.main(["analyse", "hessian", str(run), "--along", "--json", *few])
    each = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [n["step"] for n in each] == [10, 20]
    assert len(list((run / "analysis").glob("hessian_*.png"))) == 3
    alone = measure_hessian(
        Wanted(str(run), checkpoint="10", windows=1), Effort(samples=2, eigenvalue=False)
    )
    assert alone["trace"] == each[0]["trace"] != each[1]["trace"]


def test_along_leaves_damaged_checkpoints_out_and_takes_two_others(run, capsys):
    few = ("--samples", "2", "--windows", "1", "--skip-eigenvalue")
    for step in (5, 14, 15):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    file = next((run / "checkpoints" / "step_00000010").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    cli.main(["analyse", "hessian", str(run), "--along", "--json", *few])
    found = json.loads(capsys.readouterr().out)
    assert [n["step"] for n in found["checkpoints"]] == [8, 20] and found["damaged"] == [10]
    assert any("damaged: the checkpoints after 10 steps" in said for said in found["said"])
    for step in (8, 10):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    said = refused(capsys, "analyse", "hessian", run, "--along", *few)
    assert "--along needs two checkpoints" in said and "has 1 (none damaged)" in said


def test_a_checkpoint_that_a_training_removes_meanwhile_is_said(run, capsys, monkeypatch):
    """Not that it is damaged, which would be another thing."""
    from est_ds.analysis import subject

    def removed(checkpoint, *_):
        shutil.rmtree(checkpoint)
        return "checkpoint.json is missing"

    monkeypatch.setattr(subject, "damage", removed)
    said = refused(capsys, "analyse", "stability", run, "--step", "10")
    assert "checkpoint 10 of" in said and "was removed while it was read" in said


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_processes(trained):
    wanted = Wanted(str(trained), windows=2)
    one, two = (
        measure_hessian(wanted, Effort(samples=30, error=0.3, processes=n, eigenvalue=False))
        for n in (1, 2)
    )
    assert one["samples"] == two["samples"] < 30
    assert one["trace"] == pytest.approx(two["trace"], rel=1e-5)
    assert one["standard_error"] == pytest.approx(two["standard_error"], rel=1e-4)


@pytest.mark.slow
def test_an_interrupt_ends_all_processes_and_says_nothing(run):
    """While they start, which is when most are stopped."""
    command = [sys.executable, "-m", "est_ds.cli", "analyse", "hessian", str(run), "--json"]
    asked = subprocess.Popen(
        [*command, "--processes", "2", "--error", "0.001"],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    parent = psutil.Process(asked.pid)
    deadline = time.monotonic() + 200
    # Two, and the tracker of multiprocessing.
    while len(children := parent.children()) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(asked.pid, signal.SIGINT)
    assert asked.communicate(timeout=100) == (b"", b"") and asked.returncode == 130
    assert len(children) == 3 and not psutil.wait_procs(children, timeout=20)[1]
    assert not (run / "analysis").exists()


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_layout_that_wrote_the_checkpoint(in_layouts):
    def trace(layout):
        run_dir = in_layouts[layout, "full", "fp32"]
        wanted = Wanted(str(run_dir), checkpoint="5", windows=2)
        return measure_hessian(wanted, Effort(samples=6, eigenvalue=False))

    first = trace("1 process")
    for layout in ("data 2, ZeRO 1", "data 2, ZeRO 3", "pipe 2, ZeRO 0"):
        other = trace(layout)
        assert other["trace"] == pytest.approx(first["trace"], rel=1e-3), layout
        for name, group in first["by_layer"].items():
            bound = 1e-3 * abs(first["trace"])
            assert abs(other["by_layer"][name]["trace"] - group["trace"]) < bound, (layout, name)


# wrong input


def test_wrong_input_is_one_clear_error(run, tiny_run, tmp_path, capsys):
    at = ("analyse", "hessian", run)
    for more, named in (
        (("--samples", "0"), "--samples=0 is not allowed: a standard error needs at least 2"),
        (("--error", "1"), "--error=1 is not allowed"),
        (("--step", "7"), "checkpoint '7' is not in"),
        (("--windows", "0"), "--windows=0 is not allowed: the held-out corpus"),
        (("--windows", "100000"), "use 1 to "),
    ):
        assert named in refused(capsys, *at, *more)
    none = refused(capsys, "analyse", "hessian", tiny_run, f"run_dir={tmp_path / 'none'}")
    train = f"est-ds train RUN_FILE run_dir={tmp_path / 'none'}"
    assert f"holds no checkpoint; train the run first: {train}" in none
    address = refused(capsys, "analyse", "hessian", "s3://me:secret@bucket/run")
    assert "RUN='s3://...@bucket/run' is an address" in address
    study = tmp_path / "study.yaml"
    study.write_text("study_dir: a\narms: {}\n")
    assert "is a study file" in refused(capsys, "analyse", "stability", study)
    assert "is a run file" in refused(capsys, "analyse", "dropout", tiny_run)
    with pytest.raises(SystemExit) as exit:
        cli.main(["analyse", "hessian", str(run), "--seed", str(2**32)])
    assert exit.value.code == 2 and "is more than 4294967295" in capsys.readouterr().err
    assert not (run / "analysis").exists() and not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    run, capsys, monkeypatch
):
    from est_ds.analysis import hessian, stability

    for module in (hessian, stability):
        monkeypatch.setattr(module, "open_subject", lambda *_: pytest.fail("it measures"))
    (run / "analysis").write_text("")
    for name in ("hessian", "stability"):
        assert "analysis' cannot be written" in refused(capsys, "analyse", name, run)


def test_a_model_that_still_grows_is_refused(run, capsys):
    stages = "[{name: few, until: 12, layers: 2}, {name: all, until: 20, layers: 4}]"
    grows = f"method={{name: stacking, phases: {stages}}}"
    config = run / "config.yaml"
    config.write_text(load_run(run, [grows]).to_yaml())
    said = refused(capsys, "analyse", "stability", run, "--step", "10")
    assert "checkpoint 10: the model has grown to 2 of 4 layers" in said
