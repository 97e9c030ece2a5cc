"""Checkpoints belong to no layout, are complete or absent, and never resume wrongly."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from conftest import train
from est_ds.checkpoints.index import FILE, Damaged, Index, read_index
from est_ds.checkpoints.reader import Checkpoint, damage
from est_ds.checkpoints.store import Store
from est_ds.config.sections import Checkpoint as Settings
from est_ds.run.metrics import read_metrics
from layouts import LAYOUTS, METHODS, name_of
from reference import assert_close
from workers import start, train_all

EST = [f"method={METHODS['est']}"]
OFFLOAD = ["parallel.zero=2", "parallel.offload=true"]
# Each layout saves for another one: ten steps and a phase boundary to go.
PAIRS = {
    ("1 process", "data 2, ZeRO 3"): [],
    ("data 2, ZeRO 3", "pipe 2 x data 2, ZeRO 1"): [],
    ("pipe 2 x data 2, ZeRO 1", "data 2, ZeRO 2"): ["batch.micro=1"],
    ("data 2, ZeRO 2", "pipe 4, ZeRO 1"): [],
    ("pipe 4, ZeRO 1", "1 process"): ["batch.micro=8"],
    ("pipe 2 x data 2, ZeRO 1", "1 process"): [],
    ("data 2, ZeRO 0", "pipe 2, ZeRO 0"): [],
    ("pipe 2, ZeRO 0", "data 2, ZeRO 1"): [],
    ("data 2, ZeRO 1", "data 2, ZeRO 3"): ["parallel.offload=true"],
    ("data 2, ZeRO 3", "data 2, ZeRO 2"): OFFLOAD,
}
SAME = ["data 2, ZeRO 1", "data 2, ZeRO 2", "data 2, ZeRO 3", "pipe 2 x data 2, ZeRO 1"]
SAVED = 10
KEPT = ("step", "loss", "grad_norm", "lr", "tokens", "plan_digest", "data_digest")
# The fast tests, with FAST_SAME, write and read every form of a checkpoint once.
FAST_PAIRS = list(PAIRS)[:2]
FAST_SAME = [("data 2, ZeRO 2", "bf16"), ("pipe 2 x data 2, ZeRO 1", "fp32")]


def fast_first(fast: list, others: list) -> list:
    """The values of a test's parameter, of which `others` are slow."""
    return fast + [pytest.param(*o, marks=pytest.mark.slow) for o in others if o not in fast]


def back_to(run: Path, step: int, target: Path) -> Path:
    """A copy of a run as it was when `step` was its newest checkpoint."""
    shutil.copytree(run, target)
    for tag in (target / "checkpoints").glob("step_*"):
        if int(tag.name[5:]) > step:
            shutil.rmtree(tag)
    (target / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
    return target


@pytest.fixture(scope="module")
def resume(in_layouts, synthetic_run, tmp_path_factory):
    """Resumes the run of a layout at step 10 in a layout; returns its directory."""
    folder = tmp_path_factory.mktemp("resumed")

    def resume(there: str, here: str, precision: str, *more: str) -> Path:
        run = folder / name_of(there, "to", here, precision)
        back_to(in_layouts[there, "est", precision], SAVED, run)
        processes, arguments = LAYOUTS[here]
        overrides = [f"run_dir={run}", *arguments, *EST, f"precision={precision}", *more]
        said = train_all(
            folder / "log", processes, [{"run": synthetic_run, "overrides": overrides}]
        )
        assert f"resuming at step {SAVED} of 20" in said
        return run

    return resume


@pytest.mark.parametrize(("there", "here"), fast_first(FAST_PAIRS, list(PAIRS)))
def test_run_resumed_in_another_layout_goes_on_the_same(there, here, resume, in_layouts):
    run = resume(there, here, "fp32", *PAIRS[there, here])
    steps, evaluations = read_metrics(run)
    expected, expected_evaluations = read_metrics(in_layouts[there, "est", "fp32"])
    assert [e["step"] for e in steps] == list(range(20))
    assert_close([e["loss"] for e in steps], [e["loss"] for e in expected])
    assert_close([e["grad_norm"] for e in steps], [e["grad_norm"] for e in expected], within=1e-4)
    assert_close(
        [e["eval_loss"] for e in evaluations], [e["eval_loss"] for e in expected_evaluations]
    )
    digests = [[(e["plan_digest"], e["data_digest"]) for e in run] for run in (steps, expected)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("layout", "precision"), fast_first(FAST_SAME, list(product(SAME, ["fp32", "bf16"])))
)
def test_run_resumed_in_its_own_layout_is_bit_identical(layout, precision, resume, in_layouts):
    run, whole = resume(layout, layout, precision), in_layouts[layout, "est", precision]
    steps, evaluations = read_metrics(run)
    expected, expected_evaluations = read_metrics(whole)
    assert [[e[k] for k in KEPT] for e in steps] == [[e[k] for k in KEPT] for e in expected]
    assert evaluations == expected_evaluations
    for step in (14, 15, 20):
        files = [read_index(r / "checkpoints" / f"step_{step:08d}").files for r in (run, whole)]
        assert files[0] == files[1]  # sizes and hashes of weights and moments


ALL = list(product(LAYOUTS, ["fp32"])) + list(product(SAME, ["bf16"]))


@pytest.mark.parametrize(("layout", "precision"), fast_first(FAST_SAME, ALL))
def test_checkpoints_of_all_layouts_hold_the_same(layout, precision, in_layouts):
    name = "checkpoints/step_00000005"
    with Checkpoint(in_layouts["1 process", "est", "fp32"] / name) as one:
        expected = one.weights()
    with Checkpoint(in_layouts[layout, "est", precision] / name) as held:
        assert held.index.state.optimizer_steps == 5
        weights = held.weights()
    assert weights.keys() == expected.keys()
    close = 0.1 if precision == "bf16" else 1e-3
    for name, weight in weights.items():
        assert (weight - expected[name]).abs().max() < close


@pytest.fixture(scope="session")
def uninterrupted(in_layouts) -> Path:
    return in_layouts["data 2, ZeRO 1", "est", "fp32"]


@pytest.fixture
def run_at_15(uninterrupted, tmp_path) -> Path:
    return back_to(uninterrupted, 15, tmp_path / "run")


FILES = (FILE, "rank_00000.safetensors", "rank_00001.safetensors")


def harm(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        with file.open("r+b") as f:
            f.truncate(file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[random.Random(f"{file.name}{how}").randrange(len(content))] ^= 4
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "truncated", "one bit flipped"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_named(name, how, run_at_15):
    checkpoint = run_at_15 / "checkpoints" / "step_00000015"
    assert damage(checkpoint) is None
    harm(checkpoint / name, how)
    assert name in damage(checkpoint)


def test_damaged_checkpoint_gives_way_to_the_newest_good_one(run_at_15, uninterrupted):
    for step, (name, how) in {15: (FILES[1], "flipped"), 14: (FILES[0], "truncated")}.items():
        harm(run_at_15 / "checkpoints" / f"step_{step:08d}" / name, how)
    done = train(run_at_15, processes=2)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 10 of 20" in done.stdout
    for step, name in ((15, FILES[1]), (14, FILES[0])):
        [line] = [x for x in done.stdout.splitlines() if f"step_{step:08d} is damaged: {name}" in x]
        assert line.startswith("warning: ") and "resuming from step 10 instead" in line
        assert (run_at_15 / "checkpoints" / f"damaged_step_{step:08d}").is_dir()
    steps, _ = read_metrics(run_at_15)
    expected, _ = read_metrics(uninterrupted)
    assert [e["loss"] for e in steps] == [e["loss"] for e in expected]


def test_damaged_checkpoint_is_an_error_where_the_latest_was_asked_for(run_at_15):
    harm(run_at_15 / "checkpoints" / "step_00000015" / FILES[2], "flipped")
    done = train(run_at_15, "resume=latest", processes=2)
    assert done.returncode == 2
    assert "rank_00001.safetensors is not what was written" in done.stderr
    assert "resume=auto" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", FILES[:2])
def test_run_without_any_good_checkpoint_does_not_begin_anew(name, run_at_15):
    for checkpoint in (run_at_15 / "checkpoints").glob("step_*"):
        harm(checkpoint / name, "missing")
    before = (run_at_15 / "metrics.jsonl").read_bytes()
    done = train(run_at_15, processes=2)
    assert done.returncode == 2 and "no checkpoint of the run is good" in done.stderr
    assert (run_at_15 / "metrics.jsonl").read_bytes() == before


def test_renamed_checkpoint_is_not_taken_for_another_step(run_at_15):
    folder = run_at_15 / "checkpoints"
    shutil.rmtree(folder / "step_00000015")
    (folder / "step_00000010").rename(folder / "step_00000015")
    assert "is of step 10" in damage(folder / "step_00000015")


def test_damaged_checkpoints_are_set_aside_and_do_not_count(run_at_15):
    store = Store(run_at_15 / "checkpoints")
    store.set_aside(15)
    assert store.steps() == [5, 8, 10, 14]
    assert (store.folder / "damaged_step_00000015" / FILE).exists()
    store.keep(14, Settings(every=5, keep_last=2, keep_best=False))
    assert store.steps() == [10, 14]


def test_config_changed_behind_the_run_is_refused(run_at_15):
    text = (run_at_15 / "config.yaml").read_text()
    (run_at_15 / "config.yaml").write_text(text.replace("weight_decay: 0.1", "weight_decay: 5.0"))
    done = train(run_at_15, processes=2)
    assert done.returncode == 2
    assert "optimizer.weight_decay is 0.1 there and 5.0 here" in done.stderr


@pytest.mark.parametrize("latest", ["", "step_99999999", "\x00garbage"])
def test_lost_pointer_is_made_up_for(latest, run_at_15):
    (run_at_15 / "checkpoints" / "latest").write_text(latest)
    assert Store(run_at_15 / "checkpoints").candidates() == [15, 14, 10, 8, 5]


def test_checkpoints_are_kept_as_the_settings_say(uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    store = Store(run / "checkpoints")
    losses = {step: read_index(store.path(step)).eval_loss for step in store.steps()}
    assert {step for step, loss in losses.items() if loss is not None} == {10, 20}
    # The one in the middle is made the best.
    tree = json.loads((store.path(10) / FILE).read_text())
    tree.pop("sha256")
    (store.path(10) / FILE).write_text(Index(**{**tree, "eval_loss": 1.0}).to_json())
    store.keep(20, Settings(every=1, keep_last=1, keep_every=7))
    assert store.steps() == [10, 14, 20]
    assert (store.named("latest"), store.named("best")) == (20, 10)
    store.keep(20, Settings(every=1, keep_last=1, keep_best=False))
    assert store.steps() == [20]
    assert (store.named("latest"), store.named("best")) == (20, 20)


def test_bytes_are_the_same_whether_written_aside_or_not(uninterrupted, synthetic_run, tmp_path):
    layout = "data 2, ZeRO 1"
    processes, arguments = LAYOUTS[layout]
    overrides = [f"run_dir={tmp_path}/run", *arguments, *EST, "checkpoint.asynchronous=false"]
    train_all(tmp_path / "log", processes, [{"run": synthetic_run, "overrides": overrides}])
    for step in Store(tmp_path / "run" / "checkpoints").steps():
        tag = f"checkpoints/step_{step:08d}"
        for name in FILES[1:]:
            written = (tmp_path / "run" / tag / name).read_bytes()
            assert written == (uninterrupted / tag / name).read_bytes()


SLOW_S = 4.0


def test_slow_disk_does_not_stop_training(synthetic_run, tmp_path):
    overrides = [f"run_dir={tmp_path}/run", *LAYOUTS["1 process"][1], *EST]
    overrides += ["checkpoint.every=100", "steps=20"]  # saved at 8, 14 and 20
    job = {"run": synthetic_run, "overrides": overrides, "slow_disk_s": SLOW_S}
    began = time.monotonic()
    train_all(tmp_path / "log", 1, [job])
    assert time.monotonic() - began > 3 * SLOW_S
    marks = json.loads((tmp_path / "run" / "marks.json").read_text())
    # Eight steps are written down within the seconds that the file of step 8 takes.
    assert marks["steps"]["13"] < marks["written"][0]


def test_checkpoints_are_completed_without_looking_at_files(synthetic_run, tmp_path):
    processes, arguments = LAYOUTS["data 2, ZeRO 1"]
    job = {"run": synthetic_run, "overrides": [f"run_dir={tmp_path}/run", *arguments, *EST]}
    train_all(tmp_path / "log", processes, [{**job, "late_markers": True}])
    store = Store(tmp_path / "run" / "checkpoints")
    assert store.steps() == [5, 8, 10, 14, 15, 20] and store.named("latest") == 20
    assert all(damage(store.path(step)) is None for step in store.steps())


def test_rank_0_stays_until_no_rank_needs_its_store(synthetic_run, tmp_path):
    """After its last save a run ends, with the store."""
    processes, arguments = LAYOUTS["data 2, ZeRO 1"]
    short = ["steps=2", "method={name: full}", "evaluate.sequences=4", "log={step_times: false}"]
    job = {"run": synthetic_run, "overrides": [f"run_dir={tmp_path}/run", *arguments, *short]}
    train_all(tmp_path / "log", processes, [{**job, "slow_store_s": 2.0}])


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300 * 1024, 300 * 1024))


def test_full_disk_ends_the_run_and_leaves_the_last_checkpoint(run_at_15):
    """The limit of a file's size stands for the disk's: writing fails in the same place."""
    done = train(run_at_15, processes=2, first=limit_files)
    assert done.returncode == 1
    assert "could not write the checkpoint" in done.stderr and "Traceback" not in done.stderr
    assert Store(run_at_15 / "checkpoints").candidates()[0] == 15
    assert damage(run_at_15 / "checkpoints" / "step_00000015") is None
    again = train(run_at_15, processes=2)
    assert again.returncode == 0 and "resuming at step 15" in again.stdout


def test_too_little_disk_space_is_found_before_training(run_at_15):
    files = (run_at_15 / "checkpoints" / "step_00000015").glob("*.safetensors")
    needed = sum(file.stat().st_size for file in files)
    job = {"run": run_at_15, "overrides": LAYOUTS["data 2, ZeRO 1"][1], "free_bytes": needed // 2}
    codes, logs = start(run_at_15.parent / "log", 2, [job])
    assert codes == [1, 1]
    for log in logs:
        assert "a checkpoint takes" in log and "make room there" in log
    assert len(read_metrics(run_at_15)[0]) == 15


@pytest.mark.slow  # test_sigkill.py has a fast case
@pytest.mark.parametrize("kills", [1, 5])
def test_killed_while_saving_a_run_goes_on_bit_identically(
    kills, uninterrupted, synthetic_run, tmp_path
):
    layout, draw = "data 2, ZeRO 1", random.Random(7)
    processes, arguments = LAYOUTS[layout]
    run_dir = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "est_ds.cli", "train", synthetic_run, f"run_dir={run_dir}"),
        *(*arguments, *EST, "checkpoint.every=1", "--processes", str(processes)),
    ]
    for _ in range(kills):
        started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # A folder is there for about as long as a rank writes.
        until = time.monotonic() + 120
        while not list(run_dir.glob("checkpoints/.step_*.partial")):
            assert started.poll() is None and time.monotonic() < until
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        started.send_signal(signal.SIGKILL)
        started.wait()
        while subprocess.run(["pgrep", "-f", str(run_dir)], capture_output=True).stdout:
            time.sleep(0.1)
        store = Store(run_dir / "checkpoints")
        assert all(damage(store.path(step)) is None for step in store.steps())
    done = train(
        synthetic_run,
        f"run_dir={run_dir}",
        *arguments,
        *EST,
        "checkpoint.every=5",
        processes=processes,
    )
    assert done.returncode == 0, done.stderr
    final = "checkpoints/step_00000020"
    assert read_index(run_dir / final).files == read_index(uninterrupted / final).files
    assert not list(run_dir.glob("checkpoints/.step_*"))


def test_checkpoint_of_another_format_says_so(run_at_15):
    checkpoint = run_at_15 / "checkpoints" / "step_00000015"
    tree = json.loads((checkpoint / FILE).read_text())
    (checkpoint / FILE).write_text(json.dumps({**tree, "format": 1}))
    with pytest.raises(Damaged, match="format"):
        read_index(checkpoint)
