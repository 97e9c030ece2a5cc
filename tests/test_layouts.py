"""Every layout and method trains what one process of plain torch trains.

The golden losses in `tests/golden` are of synthetic tokens, so that they hold on any machine; after
a change that is meant to move them, write them again: `python tests/test_layouts.py`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from layouts import BF16_BOUND, LAYOUTS, METHODS, Lazily, write_run
from reference import Reference, assert_close, plain_adamw

from est_ds.config.run_file import load_run
from est_ds.run.metrics import read_metrics

GOLDEN = Path(__file__).parent / "golden"
# Every layout and every method once; raptr leaves a stage of the pipelines without any layer.
FAST = {
    *(("1 process", "est"), ("data 2, ZeRO 0", "raptr"), ("data 2, ZeRO 1", "est")),
    *(("data 2, ZeRO 2", "full"), ("data 2, ZeRO 3", "est"), ("pipe 2, ZeRO 0", "raptr")),
    *(("pipe 2 x data 2, ZeRO 1", "est"), ("pipe 4, ZeRO 1", "raptr")),
}
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(LAYOUTS, METHODS)
]
BF16_FAST = ["data 2, ZeRO 2", "pipe 2 x data 2, ZeRO 1"]
BF16_SLOW = ["data 2, ZeRO 1", "data 2, ZeRO 3", "pipe 4, ZeRO 1"]
BF16_LAYOUTS = BF16_FAST + [pytest.param(name, marks=pytest.mark.slow) for name in BF16_SLOW]


@pytest.fixture(scope="module")
def references(synthetic_run, tmp_path_factory) -> dict[tuple[str, str], Reference]:
    """By method and precision."""
    folder = tmp_path_factory.mktemp("references")

    def train(key: tuple[str, str]) -> Reference:
        method, precision = key
        overrides = ["parallel={pipe: 1, zero: 1}", f"method={METHODS[method]}"]
        overrides += [f"run_dir={folder}/run", f"precision={precision}"]
        return plain_adamw(load_run(synthetic_run, overrides))

    return Lazily(train)


@pytest.mark.parametrize("method", METHODS)
def test_plain_adamw_gives_the_golden_losses(method, references):
    golden = [float(line) for line in (GOLDEN / f"{method}.txt").read_text().split()]
    assert_close(references[method, "fp32"].losses, golden)


@pytest.mark.parametrize(("layout", "method"), CASES)
def test_layout_equals_plain_adamw(layout, method, in_layouts, references):
    expected = references[method, "fp32"]
    steps, evaluations = read_metrics(in_layouts[layout, method, "fp32"])
    assert_close([e["loss"] for e in steps], expected.losses)
    assert_close([e["grad_norm"] for e in steps], expected.norms, within=1e-4)
    assert_close([e["eval_loss"] for e in evaluations], list(expected.held_out.values()))


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bf16_equals_plain_adamw_on_fp32_weights_within_the_bound(layout, in_layouts, references):
    expected = references["est", "bf16"]
    steps, evaluations = read_metrics(in_layouts[layout, "est", "bf16"])
    assert_close([e["loss"] for e in steps], expected.losses, within=BF16_BOUND)
    assert_close(
        [e["eval_loss"] for e in evaluations], list(expected.held_out.values()), BF16_BOUND
    )
    # As long as the weights are the same: gradients are added up and reduced in fp32.
    assert_close([e["grad_norm"] for e in steps[:2]], expected.norms[:2], within=1e-6)


def test_some_plan_of_raptr_leaves_a_pipe_stage_without_layers(synthetic_run):
    from est_ds.design import plan_run

    config = load_run(synthetic_run, [f"method={METHODS['raptr']}", "parallel={pipe: 1}"])
    plans = [plan_run(config).method.plan(step) for step in range(8)]
    assert any(not set(plan.kept_layers) & set(pair) for plan in plans for pair in ((2, 3), (4, 5)))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder))
        for method, section in METHODS.items():
            config = load_run(run, [f"run_dir={folder}/r", "parallel={}", f"method={section}"])
            losses = plain_adamw(config).losses
            (GOLDEN / f"{method}.txt").write_text("".join(f"{loss:.7f}\n" for loss in losses))
