"""The table of `configs/README.md` and the README say what the presets save, by both accountings.

After a change of presets `python tests/test_preset_savings.py` writes the table again: its figures,
and for a new preset a row, of the run est_gpt2 unless another is written there.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from est_ds.config.run_file import load_run
from est_ds.cost import flops
from est_ds.design import make_design

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
TABLE = CONFIGS / "README.md"
ROW = re.compile(
    r"^\| \[(\w+)\]\(method/\1\.yaml\) \| (\w+)\.yaml \| ([\d.]+) % \| ([\d.]+) % \|", re.MULTILINE
)
OVERRIDES = re.compile(r"^\| (\w+) \| (constant_\w+) \| `([\w.]+)=(\d+)` \|", re.MULTILINE)
ROWS = ROW.findall(TABLE.read_text())


def saved(run: str, *overrides: str) -> flops.Flops:
    """Fractions saved by a run file, as `est-ds plan` has them."""
    config = load_run(CONFIGS / "run" / f"{run}.yaml", list(overrides))
    design = make_design(config)
    lengths = {"sequence": config.data.sequence, "target_sequence": design.target_sequence}
    return flops.saved(design.method, **lengths)


def by_preset(preset: str, run: str) -> flops.Flops:
    return saved(run, f"method={CONFIGS / 'method' / preset}.yaml")


def test_every_preset_has_its_row():
    found = {preset for preset, *_ in ROWS}
    assert found == {file.stem for file in (CONFIGS / "method").glob("*.yaml")}


@pytest.mark.parametrize(("preset", "run", "blocks", "model"), ROWS)
def test_row_says_what_the_plan_says(preset, run, blocks, model):
    found = by_preset(preset, run)
    assert (blocks, model) == (f"{found.blocks:.2%}"[:-1], f"{found.model:.2%}"[:-1])


RUNS = ("est_gpt2", "est_tinyllama", "raptr_bert", "raptr_ul2")


@pytest.mark.parametrize("run", RUNS)
def test_controls_take_the_flops_of_the_run(run):
    """One rate of dropping, and the nearest number of layers of a dense model."""
    [(constant, field, layers)] = [
        c for name, *c in OVERRIDES.findall(TABLE.read_text()) if name == run
    ]
    expected = saved(run).model
    assert by_preset(constant, run).model == pytest.approx(expected, abs=2e-6)

    def dense(count: int) -> float:
        path = CONFIGS / "run" / f"{run}.yaml"
        design = make_design(load_run(path, ["method.name=full", f"{field}={count}"]))
        return flops.dense_flops(design.method.shape, **design.flops_size(1)).model

    whole = make_design(load_run(CONFIGS / "run" / f"{run}.yaml"))
    full = flops.dense_flops(whole.method.shape, **whole.flops_size(1)).model
    off = {n: abs(dense(n) / full - (1 - expected)) for n in (int(layers) + d for d in (-1, 0, 1))}
    assert min(off, key=off.get) == int(layers)


def write() -> None:
    def row(preset: str, run: str) -> str:
        found = by_preset(preset, run)
        figures = " | ".join(f"{f:.2%}".replace("%", " %") for f in (found.blocks, found.model))
        return f"| [{preset}](method/{preset}.yaml) | {run}.yaml | {figures} |\n"

    text = TABLE.read_text()
    first, *_, last = ROW.finditer(text)
    there = {preset: run for preset, run, *_ in ROWS}
    presets = {file.stem for file in (CONFIGS / "method").glob("*.yaml")}
    runs = {preset: run for preset, run in there.items() if preset in presets}
    runs |= dict.fromkeys(sorted(presets - set(there)), "est_gpt2")
    rows = "".join(row(preset, run) for preset, run in runs.items())
    TABLE.write_text(text[: first.start()] + rows + text[last.end() + 1 :])


if __name__ == "__main__":
    write()
