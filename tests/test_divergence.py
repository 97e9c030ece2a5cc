"""Losses and gradients that are no number, and losses that jump: every rank decides alike, and a
step that is left out takes nothing with it."""

from __future__ import annotations

import json
import shutil
from math import inf, nan
from pathlib import Path

import pytest
import torch

from conftest import est_ds, tensorboard_points, train
from est_ds.checkpoints.state import Seen
from est_ds.checkpoints.store import Store
from est_ds.config.run_file import load_run
from est_ds.config.sections import Divergence
from est_ds.data.objectives.loss import token_loss
from est_ds.errors import Diverged
from est_ds.report.summary import summarise
from est_ds.run.metrics import read_events, read_metrics
from est_ds.training.divergence import History
from est_ds.verify_resume.compare import Bounds, compare_runs
from layouts import BF16_BOUND, LAYOUTS, METHODS, Lazily, name_of
from reference import assert_close, plain_adamw
from workers import start, train_all

EST, FULL = (f"method={METHODS[name]}" for name in ("est", "full"))
# A whole activation on the last rank, then gradients of the first rank alone: in a pipeline those
# of its first layers only.
POISON = [[6, "loss"], [11, "gradient"]]
KEPT = ("step", "loss", "grad_norm", "lr", "tokens", "plan_digest", "data_digest")


# name: layout, overrides
CASES = {name: (name, []) for name in LAYOUTS if name != "pipe 4, ZeRO 1"} | {
    "bf16": ("data 2, ZeRO 1", ["precision=bf16"]),
    "bf16 in a pipeline": ("pipe 2, ZeRO 0", ["precision=bf16", "parallel.zero=1"]),
    "offload, ZeRO 2": ("data 2, ZeRO 2", ["parallel.offload=true"]),
    "offload, ZeRO 3": ("data 2, ZeRO 3", ["parallel.offload=true"]),
    **{
        f"plans by micro-batch, {layout}": (layout, ["method.draw=micro_batch"])
        for layout in ("data 2, ZeRO 1", "data 2, ZeRO 2", "data 2, ZeRO 3", "pipe 2, ZeRO 0")
    },
}
SLOW = pytest.mark.slow
FAST = ["bf16", "pipe 2, ZeRO 0"]
SKIPPING = FAST + [pytest.param(name, marks=SLOW) for name in CASES if name not in FAST]
GOING_BACK = [
    *("pipe 2, ZeRO 0", "data 2, ZeRO 2"),
    *(pytest.param(n, marks=SLOW) for n in ("data 2, ZeRO 3", "pipe 2 x data 2, ZeRO 1")),
]


@pytest.fixture(scope="module")
def reference(synthetic_run, tmp_path_factory):
    """Losses without DeepSpeed, by method, steps left out, precision and draw."""
    folder = tmp_path_factory.mktemp("reference")

    def train(key: tuple[str, tuple[int, ...], str, str]):
        method, left_out, precision, draw = key
        settings = [f"method={METHODS[method]}", f"precision={precision}"]
        settings += [f"method.draw={draw}"] if method != "full" else []
        overrides = [f"run_dir={folder}/run", "parallel={pipe: 1, zero: 1}", *settings]
        return plain_adamw(load_run(synthetic_run, overrides), left_out)

    return Lazily(train)


@pytest.fixture(scope="module")
def poisoned(synthetic_run, tmp_path_factory):
    """Run directories by case and policy, trained when first asked for."""
    folder = tmp_path_factory.mktemp("poisoned")

    def train(key: tuple[str, str]) -> Path:
        (layout, more), policy = CASES[key[0]], key[1]
        processes, arguments = LAYOUTS[layout]
        run_dir = folder / name_of(*key)
        overrides = [f"run_dir={run_dir}", EST, *arguments, *more, f"divergence.nonfinite={policy}"]
        job = {"run": synthetic_run, "overrides": overrides, "poison": POISON}
        train_all(folder / "log", processes, [job])
        return run_dir

    return Lazily(train)


@pytest.mark.parametrize("case", SKIPPING)
def test_skipped_steps_leave_no_trace_in_any_layout(case, poisoned, reference):
    run = poisoned[case, "skip"]
    steps, _ = read_metrics(run)
    assert [e["step"] for e in steps] == [s for s in range(20) if s not in (6, 11)]
    precision, within = ("bf16", BF16_BOUND) if "bf16" in case else ("fp32", 1e-5)
    draw = "micro_batch" if "micro-batch" in case else "step"
    expected = reference["est", (6, 11), precision, draw]
    assert_close([e["loss"] for e in steps], expected.losses, within)
    if precision == "fp32":
        assert_close([e["grad_norm"] for e in steps], expected.norms, within=1e-4)
    events = {e["step"]: e["skipped"] for e in read_events(run)}
    assert events == {6: "the loss is nan", 11: "the gradients are no numbers"}


@pytest.mark.parametrize("case", GOING_BACK)
def test_going_back_gives_what_skipping_gives_bit_for_bit(case, poisoned):
    skipped, went_back = poisoned[case, "skip"], poisoned[case, "rollback"]
    assert not compare_runs(skipped, went_back, Bounds()).first
    one, other = (Store(run / "checkpoints").path(20) for run in (skipped, went_back))
    files = [json.loads((f / "checkpoint.json").read_text())["files"] for f in (one, other)]
    assert files[0] == files[1]
    assert (Store(went_back / "checkpoints").path(0)).is_dir()
    assert read_events(skipped) == read_events(went_back)
    times = [read_metrics(run)[0] for run in (skipped, went_back)]
    of_lines = [sum(e["step_s"] for e in lines) for lines in times]
    trained = [lines[-1]["trained_s"] for lines in times]
    # Steps that were computed and left out took time; those before which it went back are lost.
    assert trained[0] > of_lines[0] and trained[1] == pytest.approx(of_lines[1], rel=1e-12)


def test_stop_ends_all_ranks_before_the_step_is_applied(synthetic_run, tmp_path):
    processes, arguments = LAYOUTS["pipe 2, ZeRO 0"]
    overrides = [f"run_dir={tmp_path}/run", *arguments, EST]
    job = {"run": synthetic_run, "overrides": overrides, "poison": [[11, "gradient"]]}
    codes, logs = start(tmp_path / "log", processes, [job], timeout_s=120)
    assert codes == [1] * processes
    for log in logs:
        assert "step 11: the gradients are no numbers; the step was not applied" in log
    assert Store(tmp_path / "run" / "checkpoints").latest == 10


def test_diverging_run_ends_with_code_3_and_one_line(tiny_run, tmp_path):
    too_high = ["optimizer.lr=1e30", "schedule.warmup=0", "parallel.pipe=1"]
    done = est_ds("train", tiny_run, f"run_dir={tmp_path}/run", *too_high, "--processes", "2")
    assert done.returncode == 3
    [line] = done.stderr.splitlines()
    assert line.startswith("est-ds: failed: step ") and "was not applied" in line
    before = read_metrics(tmp_path / "run")[0][-1]["step"]
    again = train(tmp_path / "run", "divergence.nonfinite=skip", "divergence.limit=1", processes=2)
    assert again.returncode == 3 and "divergence.limit" in again.stderr
    assert [e["step"] for e in read_events(tmp_path / "run")] == [before + 1]


def test_resumed_run_still_leaves_out_what_was_skipped(poisoned, tmp_path):
    run = shutil.copytree(poisoned["data 2, ZeRO 2", "rollback"], tmp_path / "run")
    for step in (20, 15):
        shutil.rmtree(Store(run / "checkpoints").path(step))
    (run / "checkpoints" / "latest").write_text("step_00000014\n")
    before = read_metrics(run)
    train_all(tmp_path / "log", 2, [{"run": run, "overrides": [f"run_dir={run}"]}])
    after = read_metrics(run)
    assert [[e[k] for k in KEPT] for e in after[0]] == [[e[k] for k in KEPT] for e in before[0]]
    index = json.loads((Store(run / "checkpoints").path(20) / "checkpoint.json").read_text())
    assert list(index["state"]["divergence"]["skipped"]) == ["6", "11"]


def test_run_goes_back_and_never_forward_to_checkpoints_of_a_lost_future(poisoned, tmp_path):
    run = shutil.copytree(poisoned["data 2, ZeRO 2", "rollback"], tmp_path / "run")
    store = Store(run / "checkpoints")
    # Back to step 14, whose checkpoint is bad, as is the one before it; later ones are there still.
    (store.folder / "latest").write_text("step_00000014\n")
    for step in (14, 10):
        (store.path(step) / "rank_00000.safetensors").write_bytes(b"bad")
    job = {"run": run, "overrides": [f"run_dir={run}"], "poison": [[12, "loss"]]}
    said = train_all(tmp_path / "log", 2, [job])
    assert "going back" in said and "at step 10, the last checkpoint" in said
    steps, _ = read_metrics(run)
    trained = [s for s in range(20) if s not in (6, 12)]
    assert [e["step"] for e in steps] == trained
    assert tensorboard_points(run)["train/loss"] == [step + 1 for step in trained]
    assert store.latest == 20


def test_run_without_a_trained_step_in_a_phase_is_done_and_summed_up(synthetic_run, tmp_path):
    policy = ["divergence.nonfinite=skip", "divergence.limit=20"]
    overrides = [f"run_dir={tmp_path}/run", *LAYOUTS["pipe 2, ZeRO 0"][1], EST, *policy]
    poison = [[step, "loss"] for step in (*range(8, 14), 19)]
    train_all(
        tmp_path / "log", 2, [{"run": synthetic_run, "overrides": overrides, "poison": poison}]
    )
    found = summarise(tmp_path / "run")
    assert [phase.name for phase in found.phases] == ["small", "full"]
    assert (found.num_steps, found.skipped) == (20, (*range(8, 14), 19))
    assert found.tokens == 13 * 8 * 64
    again = est_ds("train", tmp_path / "run")
    assert again.returncode == 0 and "steps left out" in again.stdout


def test_more_bad_steps_than_the_limit_end_the_run(synthetic_run, tmp_path):
    processes, arguments = LAYOUTS["data 2, ZeRO 2"]
    policy = ["divergence.nonfinite=skip", "divergence.limit=2"]
    overrides = [f"run_dir={tmp_path}/run", *arguments, EST, *policy]
    poison = [[step, "loss"] for step in (3, 4, 12)]
    job = {"run": synthetic_run, "overrides": overrides, "poison": poison}
    codes, logs = start(tmp_path / "log", processes, [job], timeout_s=120)
    assert codes == [1, 1]
    assert "2 steps have been skipped already (divergence.limit)" in logs[0]


def test_spike_is_left_out_and_the_run_equals_one_without_that_step(
    synthetic_run, reference, tmp_path
):
    jobs = []
    for policy in ("report", "rollback"):
        spikes = [f"divergence.spikes={policy}", "divergence.window=16", "divergence.deviations=2"]
        overrides = [f"run_dir={tmp_path}/{policy}", *LAYOUTS["data 2, ZeRO 1"][1], FULL, *spikes]
        jobs.append({"run": synthetic_run, "overrides": overrides, "poison": [[16, "jump"]]})
    train_all(tmp_path / "log", 2, jobs)
    [event] = read_events(tmp_path / "report")
    assert event["step"] == 16 and "is a spike" in event["spike"]
    [event] = read_events(tmp_path / "rollback")
    assert event["step"] == 16 and "is a spike" in event["skipped"]
    steps, _ = read_metrics(tmp_path / "rollback")
    assert_close([e["loss"] for e in steps], reference["full", (16,), "fp32", "step"].losses)


def test_infinite_loss_with_finite_gradient_poisons_the_gradient():
    # The target's logit is so low that exp() of it is zero: its probability's gradient is -1.
    logits = torch.zeros(1, 2, 4, requires_grad=True)
    wrong = logits - torch.tensor([0.0, inf, 0.0, 0.0])
    loss = token_loss(wrong, torch.tensor([[1, 0]]))
    loss.backward()
    assert loss.isnan() and logits.grad.isnan().any()


def test_finite_losses_and_gradients_are_not_touched():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.tensor([[0, 1, 2], [3, 4, -100]])
    loss = token_loss(logits, labels)
    loss.backward()
    plain = logits.detach().clone().requires_grad_()
    expected = (
        torch.nn.functional.cross_entropy(plain.flatten(0, 1), labels.flatten(), reduction="sum")
        / 6
    )
    expected.backward()
    assert loss == expected and torch.equal(logits.grad, plain.grad)


LEVEL = [3.0, 3.1, 2.9, 3.05, 2.95, 3.0, 3.1, 2.9]


def history(seen=None, boundaries=(), **settings) -> History:
    return History(Divergence(**settings), boundaries, seen)


def losses(past: History, values, first: int = 0) -> list[str | None]:
    found = []
    for step, value in enumerate(values, start=first):
        past.begin(step)
        past.judge(step, value, 1.0)
        found.append(past.spike)
    return found


def test_spike_is_judged_by_the_median_and_not_by_former_spikes():
    found = losses(history(window=16), [*LEVEL, 9.0, 3.0, 9.0, 3.1, 3.2])
    assert [i for i, spike in enumerate(found) if spike] == [8, 10]
    assert found[8].startswith("the loss 9.0000 is a spike (above 3.")


def test_losses_of_another_phase_are_not_compared():
    assert not any(losses(history(window=16, boundaries={8}), [*LEVEL, 9.0, 9.1, 8.9]))


def test_history_of_a_checkpoint_goes_on_as_if_never_stopped():
    whole, first = history(window=16), history(window=16)
    losses(first, LEVEL[:4])
    again = history(Seen.model_validate_json(first.seen.model_dump_json()), window=16)
    found = losses(whole, [*LEVEL, 9.0])[4:]
    assert losses(again, [*LEVEL[4:], 9.0], first=4) == found and found[-1]


@pytest.mark.parametrize("loss, norm", [(nan, 1.0), (inf, 1.0), (2.0, inf), (2.0, nan)])
def test_what_is_no_number_stops_by_default(loss, norm):
    with pytest.raises(Diverged, match="step 4: the (loss|gradients).*was not applied"):
        history().judge(4, loss, norm)


@pytest.mark.parametrize(
    "setting, said",
    [
        ("divergence.limit=3", "no effect with nonfinite=stop and spikes=report"),
        ("divergence.nonfinite=ignore", "divergence.nonfinite='ignore'"),
        ("divergence.window=8", "divergence.window=8"),
        ("divergence.skip=2", "unknown key 'divergence.skip'"),
    ],
)
def test_wrong_settings_are_refused(setting, said, tiny_run, tmp_path):
    done = est_ds("train", tiny_run, f"run_dir={tmp_path}/run", setting)
    assert done.returncode == 2 and said in done.stderr
    assert not Path(tmp_path / "run").exists()
