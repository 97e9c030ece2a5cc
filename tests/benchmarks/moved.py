"""A run that is killed ten times and moved twice, beside the run that nobody touched.

    python tests/benchmarks/moved.py [--steps 200] [--kills 10] [--out configs/figures/moved.png]

`est-ds train` is started, all of it is killed with SIGKILL at steps that a seeded generator draws,
and it is started again: first on two pipe stages with two replicas each, then under ZeRO 3 on two
replicas, at last on one process. The picture has the loss of every step, of this run and of one
that stayed in the first layout, and the difference. Exit code 1: another plan or batch in some
step, or a difference above `--bound`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import yaml
from common import model_section, run_script
from matplotlib.figure import Figure

from data_prep.__main__ import main as data_prep
from est_ds.config.arguments import above_zero, natural, positive
from est_ds.plans.phases import Phase
from est_ds.report import style
from est_ds.run.metrics import read_metrics
from namespaces import kill_all

LAYOUTS = {
    "pipeline 2 x 2": "{pipe: 2, zero: 1, processes: 4}",
    "ZeRO 3 x 2": "{pipe: 1, zero: 3, processes: 2}",
    "one process": "{pipe: 1, zero: 0, processes: 1}",
}
METHOD = {
    "name": "est",
    "balance_groups": 2,
    "phases": [
        {"name": "small", "until": 0.3, "layers": 0.5, "heads": 0.5, "columns": 0.5},
        {"name": "narrow", "until": 0.65, "heads": 0.5, "columns": 0.5},
        {"name": "full", "until": 1.0},
    ],
}
SOURCES = ("asyncio", "email", "http", "json", "logging", "unittest", "xml")
VOCABULARY, SEQUENCE, SAVED_EVERY = 1024, 64, 10


@dataclass(frozen=True)
class Moved:
    """What came of a run beside the one that nobody touched; a line of each for every step.

    Attributes:
        losses: of the run that nobody touched, nats a token [steps].
        moved: of the other [steps].
        other: steps with another plan or another batch.
        layouts: where the run was, from which step on, with the layout's name.
    """

    losses: np.ndarray
    moved: np.ndarray
    other: tuple[int, ...]
    layouts: tuple[Phase, ...]

    @property
    def apart(self) -> np.ndarray:
        """Relative differences [steps]."""
        return np.abs(self.moved - self.losses) / self.losses


# The runs


def write_run(folder: Path, steps: int) -> Path:
    """A run file on Python's own library, packed here: a Llama of 1.0 M parameters."""
    library = Path(os.__file__).parent
    texts = ("--input", *(f"{library}/{name}/**/*.py" for name in SOURCES))
    tokenizer = ("--tokenizer", str(folder / "tokenizer"))
    size = ("--vocab", str(VOCABULARY))
    for arguments in (
        ("tokenizer", *texts, "--out", str(folder / "tokenizer"), *size),
        ("pack", *texts, *tokenizer, "--out", str(folder / "code"), "--held-out", "0.1"),
    ):
        if data_prep([*arguments]):
            sys.exit(1)
    tree = {
        "run_dir": "unset",
        "steps": steps,
        "model": model_section("llama", 128, 4, VOCABULARY, SEQUENCE),
        "method": METHOD,
        "data": {
            "train": str(folder / "code.train"),
            "valid": str(folder / "code.valid"),
            "tokenizer": str(folder / "tokenizer"),
            "sequence": SEQUENCE,
        },
        "batch": {"global": 8, "micro": 2},
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "cosine", "warmup": 0.1},
        "checkpoint": {"every": SAVED_EVERY, "keep_last": 2},
        "evaluate": {"every": steps, "sequences": 32},
        "log": {"step_times": False},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def drawn_kills(count: int, steps: int, seed: int) -> list[int]:
    """Numbers of done steps at which the run is killed, in order, no two alike."""
    return sorted(random.Random(seed).sample(range(1, steps - 1), count))


def layout_of(start: int, starts: int) -> str:
    """The layout of a start: each has a third of them, the first the most."""
    return [*LAYOUTS][start * len(LAYOUTS) // starts]


def live(run: Path, run_dir: Path, layout: str, kill_at: int | None) -> int:
    """Starts the run once, and kills it when so many steps stand in its metrics; None: never.

    Returns:
        The step at which it started.
    """
    words = ("train", run, f"run_dir={run_dir}", f"parallel={LAYOUTS[layout]}", "seed=0")
    log = run_dir.with_suffix(".log")
    with log.open("w") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", "est_ds.cli", *map(str, words)],
            env={"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    while started.poll() is None:
        # What stands there before the first step of this start is of the one before.
        if kill_at is not None and (began := _began(log)) is not None:
            if began < kill_at <= len(read_metrics(run_dir)[0]):
                kill_all(started, run_dir)
                return began
        time.sleep(0.01)
    if started.returncode or kill_at is not None:
        print(log.read_text(), file=sys.stderr)
        sys.exit(f"the run ended by itself, with exit code {started.returncode}")
    return _began(log)


def _began(log: Path) -> int | None:
    found = re.search(r"ing at step (\d+) of", log.read_text())
    return int(found[1]) if found else None


def run_both(folder: Path, steps: int, kills: list[int]) -> tuple[Path, Path]:
    """Directories of the run that nobody touched, and of the one that is killed and moved."""
    run, still, moved = write_run(folder, steps), folder / "still", folder / "moved"
    live(run, still, [*LAYOUTS][0], None)
    for start, kill in enumerate([*kills, None]):
        layout = layout_of(start, len(kills) + 1)
        began = live(run, moved, layout, kill)
        end = "went to its end" if kill is None else f"killed at step {kill}"
        print(f"start {start + 1:2}: {layout:14}, from step {began}, {end}", flush=True)
    return still, moved


# What came of them


def compared(still: Path, moved: Path) -> Moved:
    lines, others = (read_metrics(run_dir)[0] for run_dir in (still, moved))
    assert [e["step"] for e in lines] == [e["step"] for e in others] == [*range(len(lines))]
    digests = ("plan_digest", "data_digest")
    other = [a["step"] for a, b in zip(lines, others) if any(a[d] != b[d] for d in digests)]
    firsts = [i for i, e in enumerate(others) if i == 0 or e["layout"] != others[i - 1]["layout"]]
    ends = [*firsts[1:], len(others)]
    names = list(LAYOUTS)[: len(firsts)]
    return Moved(
        np.array([e["loss"] for e in lines]),
        np.array([e["loss"] for e in others]),
        tuple(other),
        tuple(Phase(*part) for part in zip(names, firsts, ends, strict=True)),
    )


@style.styled()
def moved_figure(found: Moved, kills: list[int], bound: float) -> Figure:
    """Both losses over each other, the difference below, a line at every kill."""
    figure = Figure(figsize=(7.6, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    style.dress(above, f"Killed {len(kills)} times, moved twice", "nats per token")
    style.dress(below, "Difference", "relative, of the loss")
    done = np.arange(1, len(found.losses) + 1)
    above.plot(done, found.losses, color=style.SKY, lw=4, label="never touched: pipeline 2 x 2")
    above.plot(done, found.moved, color=style.BLUE, lw=1, label="killed and moved")
    differ = found.apart > 0  # the others have no place on a logarithmic axis
    label = f"{differ.sum()} of {len(done)} steps; the rest: equal"
    below.plot(done[differ], found.apart[differ], ".", color=style.BLUE, ms=4, label=label)
    below.set_ylim(1e-9, 10 * max(bound, found.apart.max()))
    below.axhline(bound, color=style.BLACK, ls=(0, (5, 3)), lw=1, label=f"bound {bound:g}")
    below.set_yscale("log")
    for axes, place in ((above, "upper right"), (below, "lower left")):
        style.shade_phases(axes, found.layouts, len(done))
        for number, kill in enumerate(kills):
            label = None if number else "SIGKILL"
            axes.axvline(kill, color=style.RED, lw=0.9, label=label)
        axes.legend(loc=place, frameon=True, framealpha=0.9, edgecolor="none")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--kills", type=positive, default=10)
    parser.add_argument("--seed", type=natural, default=0, help="of the steps of the kills")
    parser.add_argument("--bound", type=above_zero, default=1e-4, help="relative difference")
    parser.add_argument("--runs", type=Path, help="a new folder for the runs; default: not kept")
    parser.add_argument("--out", type=Path, help="the picture; default: none is drawn")
    options = parser.parse_args()
    if options.kills > options.steps - 2:
        parser.error(f"--steps {options.steps}: use at least --kills + 2")
    kills = drawn_kills(options.kills, options.steps, options.seed)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        if options.runs is None:
            options.runs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        elif options.runs.exists():
            parser.error(f"--runs {options.runs} is there; give a new folder, or remove it.")
        options.runs.mkdir(parents=True, exist_ok=True)
        found = compared(*run_both(options.runs, options.steps, kills))
    if options.out:
        style.write_figure(moved_figure(found, kills, options.bound), options.out)
    sys.exit(told(found, options.bound, time.monotonic() - began))


def told(found: Moved, bound: float, took_s: float) -> int:
    """Prints what was found; returns the exit code."""
    worst = int(found.apart.argmax())
    print(
        f"{len(found.losses)} steps, loss {found.losses[0]:.3f} to {found.losses[-1]:.3f}; largest "
        f"relative difference {found.apart[worst]:.1e}, at step {worst}; {len(found.other)} steps "
        f"with another plan or batch; {took_s:.0f} s"
    )
    return int(found.apart[worst] > bound or bool(found.other))


if __name__ == "__main__":
    run_script(main)
