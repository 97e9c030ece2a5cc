"""Packing against the tokenizer's own batch encode, on the same text in the same run.

    python tests/benchmarks/packing.py --input TEXTS.jsonl --tokenizer DIR

`packing` is the whole of `data_prep pack`: reading, parsing, encoding, writing, hashing, index and
manifest. `encode` throws the ids away. Rates are bytes of text for each second of processor time,
of all processes together, so that other programs on the machine do not enter; starting processes
is taken off, as packs of one document tell it. `over encode` compares with as many processes that
encode at the same time: two cores that share a cache are slower each, whatever runs on them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

from common import run_script

from data_prep.config import Preparation
from data_prep.pack import pack
from est_ds.config.arguments import positive
from est_ds.data.encoders import Encoder, load_encoder

BATCH_BYTES = 1 << 20


def cpu_s() -> float:
    """Processor time of this process and of those it has waited for."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def encode_all(encoder: Encoder, texts: list[str]) -> float:
    """Seconds of processor time for encoding the texts in batches."""
    encoder.encode(texts[:1])
    began = time.process_time()
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            encoder.encode(batch)
            batch, size = [], 0
    encoder.encode(batch)
    return time.process_time() - began


def encode_at_once(encoder: Encoder, texts: list[str], workers: int) -> float:
    """The same in processes that each take a share of the texts; their seconds added up."""
    if workers == 1:
        return encode_all(encoder, texts)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        shares = [(encoder, texts[first::workers]) for first in range(workers)]
        return sum(pool.starmap(encode_all, shares, chunksize=1))


def pack_all(source: Path, tokenizer: str, folder: Path, workers: int) -> tuple[float, float]:
    """Seconds of processor time, and on the wall."""
    cpu, wall = cpu_s(), time.perf_counter()
    preparation = Preparation(sources=[{"path": str(source)}], tokenizer=tokenizer)
    with contextlib.redirect_stdout(io.StringIO()):
        pack(preparation, str(folder / "out"), workers)
    return cpu_s() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="a .jsonl file of texts")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--workers", type=positive, nargs="+", default=[1, 2])
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with options.input.open(encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
    except OSError as e:
        parser.error(f"--input: {e}")
    except (ValueError, KeyError, TypeError):
        parser.error(f"--input {options.input}: every line must be JSON with a `text`")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    encoder = load_encoder(options.tokenizer)
    print(f"{megabytes:.1f} MB of text in {len(texts):,} documents")
    encoding: dict[int, list[float]] = {workers: [] for workers in options.workers}
    packing: dict[int, list[tuple[float, float]]] = {workers: [] for workers in options.workers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "one.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
        for _ in range(options.rounds):
            # Of the two processes that are asked for, one document starts one.
            alone, beside = (
                pack_all(folder / "one.jsonl", options.tokenizer, folder, workers)[0]
                for workers in (1, 2)
            )
            for workers in options.workers:
                encoding[workers].append(encode_at_once(encoder, texts, workers))
                cpu, wall = pack_all(options.input, options.tokenizer, folder, workers)
                started = alone + (workers * max(0.0, beside - alone) if workers > 1 else 0.0)
                packing[workers].append((cpu - started, wall))
    print("processes   encode MB/s   packing MB/s   over encode   packing MB/s on the wall")
    for workers in options.workers:
        pairs = zip(encoding[workers], packing[workers], strict=True)
        ratio = statistics.median(encode / pack_[0] for encode, pack_ in pairs)
        encode = megabytes / statistics.median(encoding[workers])
        cpu, wall = (megabytes / statistics.median(c) for c in zip(*packing[workers], strict=True))
        print(f"{workers:9}{encode:14.2f}{cpu:15.2f}{ratio:14.3f}{wall:27.2f}")


if __name__ == "__main__":
    run_script(main)
