"""Every layout and method trains what one process of plain torch trains.

The golden losses in `tests/golden` are of synthetic tokens, so that they hold on any machine; after
a change that is meant to move them, write them again: `python tests/test_layouts.py`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from conftest import ROOT
from est_ds.config.run_file import load_run
from est_ds.run.metrics import read_metrics
from layouts import BF16_BOUND, LAYOUTS, METHODS, Lazily, train_in, write_run
from reference import Reference, assert_close, largest_difference, plain_adamw

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
# What EST is trained at, against float64.
SIZES = {
    "the tests' model, 20 steps, lr 1e-2": ["method=" + METHODS["est"]],
    "quickstart's model, 16 steps, lr 3e-3": [
        f"model={ROOT / 'configs/model/toy.yaml'}",
        "steps=16", "optimizer.lr=3.0e-3",
        "method={name: est, balance_groups: 4, phases: ["
        "{name: small, until: 0.3, layers: 0.5, heads: 0.5, columns: 0.5}, "
        "{name: narrow, until: 0.65, heads: 0.5, columns: 0.5}, {name: full, until: 1.0}]}",
    ],
}  # fmt: skip


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
    norms = [e["grad_norm"] for e in steps]
    assert_close(norms[:1], expected.norms[:1], within=1e-6)  # of equal weights
    assert_close(norms, expected.norms, within=1e-4)
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


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_layouts_are_no_farther_from_float64_than_plain_torch(size, synthetic_run, tmp_path):
    """What differs between layouts is rounding: plain torch differs as much between orders of
    summation. Prints the figures of `configs/LAYOUTS.md`: `-k float64 -s`."""
    overrides = SIZES[size]

    def plain(micro: int, double: bool = False) -> Reference:
        extra = [f"run_dir={tmp_path}/none", "parallel={}", f"batch.micro={micro}"]
        return plain_adamw(load_run(synthetic_run, [*overrides, *extra]), double=double)

    exact = plain(2, double=True)
    found = {f"plain torch, micro-batch {n}": plain(n) for n in (1, 2, 4, 8)}
    cases = [(layout, "est", overrides) for layout in LAYOUTS]
    for (layout, *_), run_dir in zip(cases, train_in(tmp_path, synthetic_run, cases, 3600)):
        steps, _ = read_metrics(run_dir)
        losses, norms = [e["loss"] for e in steps], [e["grad_norm"] for e in steps]
        found[layout] = Reference(losses, norms, {}, None)
    apart = {name: largest_difference(run.losses, exact.losses) for name, run in found.items()}
    for name, run in found.items():
        first, norm = (largest_difference(run.norms[:n], exact.norms[:n]) for n in (1, None))
        print(f"{size} | {name} | loss {apart[name]:.1e} | norm {norm:.1e}, first {first:.1e}")
        assert first <= 1e-6
    of_plain = max(apart[name] for name in apart if name not in LAYOUTS)
    assert max(apart.values()) <= 3 * of_plain


def test_some_plan_of_raptr_leaves_a_pipe_stage_without_layers(synthetic_run):
    from est_ds.design import make_design

    config = load_run(synthetic_run, [f"method={METHODS['raptr']}", "parallel={pipe: 1}"])
    plans = [make_design(config).method.plan(step) for step in range(8)]
    assert any(not set(plan.kept_layers) & set(pair) for plan in plans for pair in ((2, 3), (4, 5)))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder))
        for method, section in METHODS.items():
            config = load_run(run, [f"run_dir={folder}/r", "parallel={}", f"method={section}"])
            losses = plain_adamw(config).losses
            (GOLDEN / f"{method}.txt").write_text("".join(f"{loss:.7f}\n" for loss in losses))
