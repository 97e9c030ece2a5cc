"""A run that an earlier version began goes on as it would have gone on then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from est_ds.run.metrics import read_metrics
from workers import train_all

EARLIER = Path(__file__).parent / "golden" / "run"
SAME = ("step", "phase", "lr", "tokens", "flops_active", "plan_digest", "data_digest")


def test_a_checkpoint_of_an_earlier_version_goes_on_as_then(synthetic_run, tmp_path):
    """Its step 10 was kept, with what the same process logged up to step 20."""
    run_dir = tmp_path / "run"
    shutil.copytree(EARLIER, run_dir)
    expected, evaluated = read_metrics(EARLIER)
    corpus = synthetic_run.parent
    paths = [f"data.{name}={corpus / name}" for name in ("train", "valid")]
    overrides = [*paths, f"data.tokenizer={corpus}"]
    train_all(tmp_path / "ranks", 1, [{"run": run_dir, "overrides": overrides}])
    found, found_evaluated = read_metrics(run_dir)
    assert [e["step"] for e in found] == list(range(20))
    for then, now in zip(expected[10:], found[10:], strict=True):
        assert {name: now[name] for name in SAME} == {name: then[name] for name in SAME}
        # On the processor that trained it to the bit; others may round otherwise.
        for name in ("loss", "grad_norm"):
            assert now[name] == pytest.approx(then[name], rel=1e-6), (now["step"], name)
    assert not any("trained_s" in e for e in found)  # it had not counted them
    losses = [e["eval_loss"] for e in found_evaluated]
    assert losses == pytest.approx([e["eval_loss"] for e in evaluated], rel=1e-6)
