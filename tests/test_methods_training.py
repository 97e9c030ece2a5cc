"""Every method, a plan a step or a micro-batch: layouts agree, and a resumed run goes on the same.

launch/test.sh -m slow tests/test_methods_training.py
"""

from __future__ import annotations

import pytest
import yaml

from cases.methods import SECTIONS, fitting
from conftest import train
from est_ds.plans.methods import METHODS
from est_ds.run.metrics import read_metrics
from reference import assert_close, largest_difference

pytestmark = pytest.mark.slow


# static_sublayer is left out: its first phase is longer than these runs.
CASES = [(name, "step") for name in SECTIONS if name != "static_sublayer"]
CASES += [(n, "micro_batch") for n, section in SECTIONS.items() if METHODS[section["name"]].draws]


@pytest.mark.parametrize(("name", "draw"), CASES)
def test_layouts_agree_and_a_resumed_run_goes_on_the_same(name, draw, tiny_run, tmp_path):
    section = fitting(SECTIONS[name], num_layers=4) | {"draw": draw}
    section.pop("balance_groups", None)
    tree = yaml.safe_load(tiny_run.read_text()) | {"steps": 10, "method": section}
    tree["checkpoint"] = {"every": 4, "keep_last": 0}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    losses = []
    for pipe, processes in ((1, 1), (2, 4)):
        run_dir = tmp_path / f"run{pipe}"
        overrides = [f"run_dir={run_dir}", f"parallel.pipe={pipe}"]
        done = train(file, *overrides, processes=processes)
        assert done.returncode == 0, done.stderr
        losses.append([e["loss"] for e in read_metrics(run_dir)[0]])
    print(f"{name} | {draw} | {largest_difference(losses[1], losses[0]):.1e}")
    assert_close(losses[1], losses[0])
    (run_dir / "checkpoints" / "latest").write_text("step_00000004\n")
    again = train(run_dir, processes=4)
    assert again.returncode == 0, again.stderr
    assert [e["loss"] for e in read_metrics(run_dir)[0]] == losses[1]
