"""How many tokens/s the loader reads, against what TinyLlama-1.1B on 8 GPUs trains: one core.

    python tests/benchmarks/loader.py [--tokens 200000000] [--steps 3]

Target: 20 times 24,000 tokens/s a GPU, for one process that reads the global batch of all 8 GPUs
and for one of 8 that read a share each. Batches are TinyLlama's, 1024 sequences of 2048 tokens.
The corpus, of documents of 800 tokens on average (log-normal), is written to a temporary folder
and stays in the page cache. Seconds are the process's own, of one core. Beside it: what finding the
samples of step 10,000,000 takes, on the wall.
"""

from __future__ import annotations

import argparse
import struct
import tempfile
import time
from pathlib import Path

import numpy as np
from common import run_script, timed

from est_ds.config.arguments import positive
from est_ds.data.indexed import Corpus
from est_ds.data.loader import Batches, Ordering, Portion, Sampling
from est_ds.data.mixture import PhaseWeights

GPUS, TOKENS_PER_S, LEAST = 8, 24_000, 20
# name: documents apart, shuffled
MODES = {
    "one corpus": (False, False),
    "documents apart": (True, False),
    "documents shuffled": (False, True),
    "shuffled and apart": (True, True),
}


def write_corpus(prefix: Path, num_tokens: int, seed: int) -> Corpus:
    """Random tokens in Megatron's format: uint16, one sequence a document."""
    generator = np.random.default_rng(seed)
    lengths = np.maximum(1, generator.lognormal(6.2, 1.0, num_tokens // 800)).astype("<i4")
    lengths = lengths[np.cumsum(lengths) <= num_tokens]
    offsets = 2 * np.concatenate([[0], np.cumsum(lengths[:-1], dtype="<i8")]).astype("<i8")
    with open(f"{prefix}.idx", "wb") as file:
        head = (b"MMIDIDX\0\0", 1, 8, len(lengths), len(lengths) + 1)
        file.write(struct.pack("<9sQBQQ", *head))
        for part in (lengths, offsets, np.arange(len(lengths) + 1, dtype="<i8")):
            file.write(part.tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        left = int(lengths.sum())
        while left:
            count = min(left, 1 << 24)
            file.write(generator.integers(0, 32000, count, "<u2").tobytes())
            left -= count
    return Corpus.open(prefix)


def measure(name: str, batches: Batches, steps: int) -> None:
    sequences, length = batches.global_batch, batches.sequence
    rates = {}
    for world in (1, GPUS):
        portion = Portion(0, world, micro=8)

        def read(step: int) -> float:
            return timed(lambda: [None for _ in batches.micro_batches(step, portion)])

        seconds = min(read(step) for step in range(steps + 1))
        rates[world] = sequences * length / world / seconds
    alone = rates[1] / (GPUS * TOKENS_PER_S)
    shared = rates[GPUS] / TOKENS_PER_S
    began = time.perf_counter()
    batches.samples(10_000_000)
    seek_ms = (time.perf_counter() - began) * 1e3
    verdict = "ok" if min(alone, shared) >= LEAST else f"MISSES {LEAST} x"
    print(
        f"{name}: one process for all {rates[1] / 1e6:.1f} M tokens/s = {alone:.0f} x the need of "
        f"{GPUS} GPUs; one of {GPUS} {rates[GPUS] / 1e6:.1f} M = {shared:.0f} x that of its own; "
        f"seek {seek_ms:.2f} ms  {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=positive, default=200_000_000)
    parser.add_argument("--batch", type=positive, default=1024)
    parser.add_argument("--sequence", type=positive, default=2048)
    parser.add_argument("--steps", type=positive, default=3)
    options = parser.parse_args()
    if options.tokens < 2 * (options.sequence + 1):
        parser.error("--tokens: two corpora, the second of half of them, need a sequence each")
    size = {"global_batch": options.batch, "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        first = write_corpus(Path(folder, "first"), options.tokens, seed=1)
        second = write_corpus(Path(folder, "second"), options.tokens // 2, seed=2)
        for name, (apart, shuffled) in MODES.items():
            sampling = Sampling(sequence=options.sequence, separate=apart)
            batches = Batches([first], sampling, Ordering(**size, shuffled=shuffled))
            measure(name, batches, options.steps)
        weights = (PhaseWeights(0, (0.6936, 0.3064)),)
        for name, (apart, shuffled) in list(MODES.items())[:: len(MODES) - 1]:
            name = name.replace("one corpus", "two corpora, .6936 / .3064")
            sampling = Sampling(sequence=options.sequence, separate=apart)
            ordering = Ordering(**size, shuffled=shuffled, weights=weights)
            measure(f"mixture: {name}", Batches([first, second], sampling, ordering), options.steps)


if __name__ == "__main__":
    run_script(main)
