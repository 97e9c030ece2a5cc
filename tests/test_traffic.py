"""What a subnetwork leaves out is not communicated, as DeepSpeed's own logger counts it."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from est_ds.config.run_file import load_run
from est_ds.design import make_design
from layouts import LAYOUTS, METHODS, Lazily, name_of
from workers import train_all

CASES = ["data 2, ZeRO 1", "data 2, ZeRO 2", "data 2, ZeRO 3", "pipe 2 x data 2, ZeRO 1"]
OVERRIDES = [
    "evaluate.every=100",
    "checkpoint.every=100",
    "deepspeed.comms_logger={enabled: true, prof_all: true, verbose: false}",
]
# Without these ZeRO 3 keeps parameters as small as these for good, and gathers nothing.
GATHER_ALL = "{stage3_param_persistence_threshold: 0, stage3_max_reuse_distance: 0}"

# Parameters of the synthetic run's model: a layer of hidden 64 with 8 heads, 4 key/value heads and
# 96 columns, and its two norms; the embedding, the head as large, and the last norm.
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
EMBEDDING = 512 * 64
NARROW = 64 * 64 + 2 * 64 * 32 + 3 * 64 * 48 + 2 * 64  # of a layer with half of both
GRADIENTS = ("all_reduce", "reduce", "reduce_scatter_tensor")


@pytest.fixture(scope="module")
def logged(synthetic_run, tmp_path_factory) -> dict[tuple[str, str], list]:
    """Bytes by operation of rank 0 for every step of a layout and precision."""
    folder: Path = tmp_path_factory.mktemp("traffic")

    def train(key: tuple[str, str]) -> list:
        layout, precision = key
        more = [f"method={METHODS['est']}", f"precision={precision}"]
        return traffic_of(synthetic_run, folder / name_of(*key), layout, more)

    return Lazily(train)


def traffic_of(run: Path, folder: Path, layout: str, more: list[str]) -> list:
    """Bytes by operation of rank 0 for every step."""
    processes, arguments = LAYOUTS[layout]
    zero3 = [f"deepspeed.zero_optimization={GATHER_ALL}"] if "ZeRO 3" in layout else []
    overrides = [f"run_dir={folder / 'run'}", *arguments, *OVERRIDES, *zero3, *more]
    file = folder / "traffic.json"
    said = train_all(folder, processes, [{"run": run, "overrides": overrides, "traffic": file}])
    assert "warn" not in said.lower()
    return json.loads(file.read_text())


SLOW = pytest.mark.slow
FAST = [("data 2, ZeRO 3", "fp32"), ("pipe 2 x data 2, ZeRO 1", "fp32")]
ALL = [
    pytest.param(*case, marks=() if case in FAST else SLOW)
    for case in product(CASES, ["fp32", "bf16"])
]


@pytest.mark.parametrize(("layout", "precision"), ALL)
def test_what_a_plan_leaves_out_is_not_reduced(layout, precision, logged):
    steps = logged[layout, precision]
    # Of rank 0: two micro-batches each; ZeRO 2 and 3 reduce every one of them.
    times = 2 if "ZeRO 2" in layout or "ZeRO 3" in layout else 1
    outside = EMBEDDING if "pipe" in layout else 2 * EMBEDDING + 64
    layers = 4 if "pipe" in layout else 8
    reduced = [sum(step.get(op, 0) for op in GRADIENTS) for step in steps]
    small, full = (reduced[i] - 4 * times * outside for i in (0, 19))
    assert full == pytest.approx(4 * times * layers * LAYER, abs=64)  # and a few scalars
    # Half of the layers; under ZeRO 1 also half of their heads and columns, and in all layers from
    # step 8 on. Key/value heads stay: each serves a kept head.
    of_layer = NARROW if "ZeRO 1" in layout else LAYER
    assert small == pytest.approx(4 * times * layers / 2 * of_layer, abs=64)
    assert reduced[8] - 4 * times * outside == pytest.approx(4 * times * layers * of_layer, abs=64)
    assert all(len(set(reduced[a:b])) == 1 for a, b in ((0, 8), (8, 14), (14, 20)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", CASES)
def test_plans_of_micro_batches_reduce_the_gradients_of_their_union(
    layout, synthetic_run, tmp_path
):
    method = "{name: est, phases: [{until: 6, layers: 0.25}], draw: micro_batch}"
    steps = traffic_of(synthetic_run, tmp_path, layout, [f"method={method}", "steps=6"])
    design = make_design(load_run(tmp_path / "run"))
    here = range(design.cuts[0])  # layers of rank 0
    times = 2 if "ZeRO 2" in layout or "ZeRO 3" in layout else 1
    outside = EMBEDDING if "pipe" in layout else 2 * EMBEDDING + 64
    counts = []
    for i, step in enumerate(steps):
        union = {layer for plan in design.plans(i) for layer in plan.kept_layers if layer in here}
        counts.append(len(here) if "ZeRO 3" in layout else len(union))
        reduced = sum(step.get(op, 0) for op in GRADIENTS)
        expected = 4 * times * (outside + counts[-1] * LAYER)
        assert reduced == pytest.approx(expected, abs=64)  # and a few scalars
    assert "ZeRO 3" in layout or min(counts) < len(here)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=SLOW)])
def test_zero_3_gathers_no_skipped_layer(precision, logged):
    steps = logged["data 2, ZeRO 3", precision]
    # A process sends its half of each parameter: once in a micro-batch, or, as long as the order of
    # the layers is new, in the forward and again in the backward of the first of two.
    value_bytes = 4 if precision == "fp32" else 2
    for i, step in enumerate(steps):
        layers = 4 if i < 8 else 8
        once = value_bytes * (layers * LAYER + 2 * EMBEDDING + 64)
        new = 1.5 if steps[i] != steps[i - 1] or i < 8 else 1
        assert step["all_gather_into_tensor"] in (once, pytest.approx(new * once, rel=0.001))
    assert steps[8]["all_gather_into_tensor"] > 1.4 * steps[9]["all_gather_into_tensor"]
