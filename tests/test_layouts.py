"""Every layout and method trains what one process of plain torch trains.

The golden losses in `tests/golden` are of synthetic tokens, so that they hold on any machine; after
a change that is meant to move them, write them again: `python tests/test_layouts.py`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY_MODEL, TINY_RUN
from layouts import LAYOUTS, METHODS, train_in
from reference import Reference, assert_close, largest_difference, plain_adamw

from est_ds.run_file import load_run
from est_ds.metrics import read_metrics

GOLDEN = Path(__file__).parent / "golden"
CASES = list(itertools.product(LAYOUTS, METHODS))
BF16_LAYOUTS = [
    "data 2, ZeRO 1",
    "data 2, ZeRO 2",
    "data 2, ZeRO 3",
    "pipe 2 x data 2, ZeRO 1",
    "pipe 4, ZeRO 1",
]
# Weights in bf16 have 8 bits: a sum in another order may round one of them the other way, and these
# losses fall by a third in five steps.
BF16_BOUND = 1e-3
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


def write_run(folder: Path) -> Path:
    """A run file on tokens drawn from a fixed Markov chain."""
    from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import (
        MMapIndexedDatasetBuilder,
    )

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.Generator(np.random.Philox(key=5))
    steps = draw.integers(1, 9, 40_000)  # an even chain: each token is one of eight after the last
    tokens = (np.cumsum(steps * steps) % 61).astype(np.int32)
    for name, part in (("train", tokens[:30_000]), ("valid", tokens[30_000:])):
        builder = MMapIndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.int32)
        for document in np.array_split(part, 10):
            builder.add_item(torch.from_numpy(document))
            builder.end_document()
        builder.finalize(str(folder / f"{name}.idx"))
    # The corpus names no tokenizer, and none is ever read.
    (folder / "tokenizer.model").write_bytes(b"none")
    data = {"train": str(folder / "train"), "valid": str(folder / "valid")}
    tree = {
        "run_dir": "unset",
        **TINY_RUN,
        "model": {**TINY_MODEL, "num_hidden_layers": 8},
        "optimizer": {"lr": 1e-2},
        "data": {**data, "tokenizer": str(folder), "sequence": 64},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture(scope="session")
def synthetic_run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="session")
def references(synthetic_run, tmp_path_factory) -> dict[str, Reference]:
    folder = tmp_path_factory.mktemp("references")
    extra = {"est, bf16": ["precision=bf16"]}
    return {
        name: plain_adamw(
            load_run(
                synthetic_run,
                [
                    f"run_dir={folder}/{i}",
                    "parallel={pipe: 1, zero: 1}",
                    f"method={METHODS[name.split(',')[0]]}",
                    *extra.get(name, []),
                ],
            )
        )
        for i, name in enumerate([*METHODS, *extra])
    }


@pytest.fixture(scope="session")
def trained(synthetic_run, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Run directories of every layout and method."""
    folder = tmp_path_factory.mktemp("matrix")
    cases = [(layout, name, [f"method={METHODS[name]}"]) for layout, name in CASES]
    cases += [
        (layout, "est, bf16", [f"method={METHODS['est']}", "precision=bf16"])
        for layout in BF16_LAYOUTS
    ]
    directories = train_in(folder, synthetic_run, cases)
    return {(layout, name): run for (layout, name, _), run in zip(cases, directories)}


@pytest.mark.parametrize("method", METHODS)
def test_plain_adamw_gives_the_golden_losses(method, references):
    golden = [float(line) for line in (GOLDEN / f"{method}.txt").read_text().split()]
    assert_close(references[method].losses, golden)


@pytest.mark.parametrize(("layout", "method"), CASES)
def test_layout_equals_plain_adamw(layout, method, trained, references):
    expected = references[method]
    steps, evaluations = read_metrics(trained[layout, method])
    assert_close([e["loss"] for e in steps], expected.losses)
    norms = [e["grad_norm"] for e in steps]
    assert_close(norms[:1], expected.norms[:1], within=1e-6)  # of equal weights
    assert_close(norms, expected.norms, within=1e-4)
    assert_close([e["eval_loss"] for e in evaluations], list(expected.held_out.values()))


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bf16_equals_plain_adamw_on_fp32_weights_within_the_bound(layout, trained, references):
    expected = references["est, bf16"]
    steps, evaluations = read_metrics(trained[layout, "est, bf16"])
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
    from est_ds.run import plan_run

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
