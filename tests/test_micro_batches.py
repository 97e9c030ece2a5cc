"""`method.draw: micro_batch`: every micro-batch has its own plan, the same in every layout."""

from __future__ import annotations

import pytest

from est_ds.config.run_file import load_run
from est_ds.run.metrics import read_metrics
from layouts import LAYOUTS, MORE_LAYOUTS, name_of, train_in
from reference import Reference, assert_close, plain_adamw

SIZE = "layers: 0.5, heads: 0.5, columns: 0.5"
METHODS = {
    "est": f"{{name: est, phases: [{{until: 6, {SIZE}}}, {{until: 8}}], draw: micro_batch}}",
    "raptr": "{name: raptr, phases: [{until: 6, layers: 3}, {until: 8}], draw: micro_batch}",
    # Some micro-batches train no layer at all.
    "layer_drop": "{name: layer_drop, drop: 0.8, skip: sublayer, draw: micro_batch}",
}
ALL = {**LAYOUTS, **MORE_LAYOUTS}


def overrides_of(method: str) -> list[str]:
    batch = "batch={global: 12, micro: 2}"
    return [f"method={METHODS[method]}", "steps=8", batch, "checkpoint.every=100", "evaluate.every=4"]


def expected_of(run, folder, method: str) -> Reference:
    overrides = [f"run_dir={folder}/none", "parallel={}", *overrides_of(method)]
    return plain_adamw(load_run(run, overrides))


def check(run, folder, cases) -> None:
    expected = {method: expected_of(run, folder, method) for method in {m for _, m in cases}}
    jobs = [(layout, name_of(method), overrides_of(method)) for layout, method in cases]
    for (layout, method), run_dir in zip(cases, train_in(folder, run, jobs, 3600)):
        steps, evaluations = read_metrics(run_dir)
        assert_close([e["loss"] for e in steps], expected[method].losses)
        assert_close([e["grad_norm"] for e in steps], expected[method].norms, within=1e-4)
        held_out = [e["eval_loss"] for e in evaluations]
        assert_close(held_out, list(expected[method].held_out.values()))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_every_layout_equals_plain_adamw(layout, synthetic_run, tmp_path):
    check(synthetic_run, tmp_path, [(layout, method) for method in METHODS])
