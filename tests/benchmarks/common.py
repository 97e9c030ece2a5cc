"""What the benchmarks share: model sections, plans, an engine in this process, and the clock.

Times are of the process's own clock of one thread: on an idle machine that is the time on the
wall, and on a shared one it leaves out what other programs take. Variants alternate within one
run and every ratio is taken within a round, so that a slow stretch of the machine hits both sides.
"""

from __future__ import annotations

import atexit
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from est_ds.config.run_config import RunConfig
from est_ds.config.strict import checked
from est_ds.errors import UserError
from est_ds.plans.methods import build_method
from est_ds.plans.methods.base import Method
from est_ds.plans.shape import ModelShape

CASES = {
    "layers, heads, columns .5": (0.5, 0.5, 0.5),
    "heads, columns .5": (1.0, 0.5, 0.5),
    "layers .5": (0.5, 1.0, 1.0),
    "columns .5": (1.0, 1.0, 0.5),
}


def run_script(main: Callable[[], None]) -> None:
    """A script's `main`; what it is asked and cannot do is said in a line, with exit code 2."""
    try:
        main()
    except UserError as e:
        print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        sys.exit(2)


def model_section(family: str, hidden: int, layers: int, vocabulary: int, sequence: int) -> dict:
    """A run file's `model`: heads of 64, and for Llama two query heads to a key/value head."""
    heads = max(2, hidden // 64)
    if hidden % (2 * heads):
        raise UserError(f"--hidden={hidden}: use a multiple of 4, and from 128 on one of 64.")
    if family == "gpt2":
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        size = dict(n_embd=hidden, n_layer=layers, n_head=heads, n_positions=sequence)
        ends = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
        return dict(model_type="gpt2", vocab_size=vocabulary, **size, **dropout, **ends)
    return dict(
        model_type="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        intermediate_size=hidden * 11 // 4,
        max_position_embeddings=sequence,
    )


def fixed_method(kept: tuple[float, float, float], shape: ModelShape, steps: int = 1000) -> Method:
    """EST with one phase: fractions of layers, heads and columns."""
    layers, heads, columns = kept
    phase = {"until": 1.0, "layers": layers, "heads": heads, "columns": columns}
    return build_method({"name": "est", "phases": [phase]}, seed=0, steps=steps, shape=shape)


def run_config(
    section: dict, batch: int, sequence: int, zero: int, *, micro: int = 0, **fields: Any
) -> RunConfig:
    """A run of one process whose step is one micro-batch, or several of `micro` sequences."""
    tree = {
        "run_dir": "unset",
        "steps": 1000,
        "model": section,
        "method": {"name": "full"},
        "data": {**dict.fromkeys(("train", "valid", "tokenizer"), "unset"), "sequence": sequence},
        "batch": {"global": batch, "micro": micro or batch},
        "parallel": {"zero": zero},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"every": 1000},
        "evaluate": {"every": 1000, "sequences": 1},
    }
    return checked(RunConfig, tree | fields)


def zero_engine(config: RunConfig):
    """The real engine of `est-ds train` on one process, and its model's shape."""
    from est_ds.design import make_design
    from est_ds.engine.build import build_engine
    from est_ds.engine.start import start_processes
    from est_ds.ranks.world import World

    world = World.from_environment()
    if not dist.is_initialized():
        start_processes(world)
        atexit.register(dist.destroy_process_group)  # else NCCL complains of a store that is gone
    design = make_design(config)
    return build_engine(design, world), design.method.shape


def random_batch(batch: int, sequence: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and labels, the labels one token ahead, int64 [batch, sequence]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (batch, sequence + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def timed(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def alternate(variants: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round; a round before them warms up.

    Args:
        variants: each takes the round and returns the seconds that count.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        # Every other round backwards: no variant always follows the same one.
        for name in list(variants)[:: 1 if round_ % 2 else -1]:
            seconds = variants[name](round_)
            if round_:
                times[name].append(seconds)
    return times


def ratios(times: list[float], base: list[float]) -> tuple[float, float]:
    """Median of the rounds' ratios, and ratio of the minima."""
    paired = [a / b for a, b in zip(times, base, strict=True)]
    return statistics.median(paired), min(times) / min(base)


def verdict(figure: float, most: float) -> str:
    return "ok" if figure <= most else f"MISSES {most:g}"
