"""Verb `pack`: documents into Megatron's indexed dataset, with a manifest."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_prep.config import Preparation
from data_prep.packing import Packing
from data_prep.progress import PackingProgress
from data_prep.readers.base import PIECE_BYTES, Piece, Place, Reader, Rules, report_undivided
from data_prep.sources import open_sources
from data_prep.tokenizing import Job, cores, tokenized
from est_ds.data.encoders import load_encoder, surrounding_ids
from est_ds.data.manifest import Manifest
from est_ds.data.tokenizer import tokenizer_fingerprint, tokenizer_sha256
from est_ds.errors import Failure, UserError

# Below this a further process costs more than it saves.
_BYTES_A_WORKER = 8 << 20
_PIECES_A_TASK = 500


def pack(preparation: Preparation, out: str, workers: int | None, fresh: bool = False) -> None:
    """Writes `OUT.bin`, `OUT.idx` (or `OUT-00000.bin`, ... for many tokens) and a manifest.

    With `held_out` these are `OUT.train.*` and `OUT.valid.*`. Each document becomes BOS + tokens +
    EOS (see `Preparation`), one sequence and one document of the index. Tokens are uint16 where
    the vocabulary fits, else int32.

    What was begun with the same arguments and interrupted is continued. The files depend neither
    on that nor on `workers`.

    Args:
        workers: processes that tokenize; None: one for each core, fewer for little text.
        fresh: whether to begin anew where something was interrupted.

    Raises:
        UserError: Wrong input, or no document.
        Failure: A worker died, or the disk is full.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers={workers} is not allowed; use at least 1.")
    if preparation.tokenizer is None:
        raise UserError("--tokenizer is missing; name the tokenizer's folder, here or in --config.")
    encoder = load_encoder(preparation.tokenizer)
    bos_id, eos_id = surrounding_ids(encoder, preparation.bos, preparation.eos)
    dtype = np.dtype(np.uint16 if encoder.vocabulary <= 1 << 16 else np.int32)
    if preparation.type_codes == "megatron" and dtype != np.uint16:
        raise UserError(
            f"--type-codes=megatron has no effect: the vocabulary {encoder.vocabulary} needs "
            f"{dtype.name}, which all readers number alike; leave it out."
        )
    rules = Rules(preparation.max_document_bytes, preparation.invalid)
    readers = open_sources(preparation.sources)
    job = Job(encoder, bos_id, eos_id, dtype, preparation.held_out, rules)
    settings = {
        "tokenizer_sha256": tokenizer_sha256(preparation.tokenizer),
        "tokenizer_fingerprint": tokenizer_fingerprint(preparation.tokenizer),
        "bos": bos_id,
        "eos": eos_id,
        "held_out": preparation.held_out,
        "shard_tokens": preparation.shard_tokens,
        # A packing that was begun before there was a choice has none.
        "type_codes": None if preparation.type_codes == "deepspeed" else preparation.type_codes,
        "max_document_bytes": preparation.max_document_bytes,
    }
    packing = Packing(out, job, settings, readers, fresh)
    with contextlib.closing(packing), _explained(packing):
        if packing.begun:
            print(f"{packing.folder}: going on after {packing.resumed_tokens:,} tokens", flush=True)
        if not packing.complete:
            _read(packing, readers, job, workers or _useful_workers(readers))
            report_undivided(readers)
            _check_parts(packing, out, preparation.held_out)
        manifests = packing.finish(_facts(job, settings, preparation))
    _report(manifests)
    packing.skipped.report()
    if eos_id is None:
        print(
            "no EOS: nothing ends a document, so that a model trained on this never learns to "
            "stop, and documents run into one another"
        )


def _facts(job: Job, settings: dict[str, Any], preparation: Preparation) -> dict[str, Any]:
    """Fields of the manifests that all parts share."""
    sources = [s.model_dump(mode="json", exclude_defaults=True) for s in preparation.sources]
    return {
        "dtype": job.dtype.name,
        "vocabulary": job.encoder.vocabulary,
        "bos_id": job.bos_id,
        "eos_id": job.eos_id,
        "unknown_id": job.encoder.unknown_id,
        "tokenizer_sha256": settings["tokenizer_sha256"],
        "tokenizer_fingerprint": settings["tokenizer_fingerprint"],
        "sources": sources,
    }


def _report(manifests: dict[str, Manifest]) -> None:
    for prefix, manifest in manifests.items():
        shards = f" in {len(manifest.shards)} shards" if len(manifest.shards) > 1 else ""
        print(
            f"{prefix}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens"
            f"{shards}, {manifest.text_bytes / manifest.num_tokens:.2f} bytes a token, "
            f"unigram entropy {manifest.unigram_entropy:.4f} nats"
        )


def _read(packing: Packing, readers: list[Reader], job: Job, workers: int) -> None:
    """Packs everything after the place where the packing stands."""
    sizes = [reader.stored_bytes for reader in readers]
    before = np.cumsum([0, *(size or 0 for size in sizes)])

    def done() -> tuple[int, int]:
        return int(before[packing.place.source]) + packing.place.bytes_read, packing.num_tokens

    with PackingProgress(None if None in sizes else int(before[-1]), *done()) as progress:
        tasks = _tasks(readers, packing.place, job.rules)
        for place, result in tokenized(tasks, job, workers):
            packing.add(result, place)
            progress.update(*done())


def _tasks(
    readers: list[Reader], start: Place, rules: Rules
) -> Iterator[tuple[Place, list[Piece]]]:
    """Pieces of all sources from a place on, gathered until they are worth sending away, each
    time with the place where they end."""
    pieces, size, place = [], 0, start
    for number in range(start.source, len(readers)):
        position = start.position if number == start.source else None
        for piece in readers[number].pieces(position, rules):
            pieces.append(piece)
            size += piece.size
            place = Place(number, piece.position, piece.bytes_read)
            if size >= PIECE_BYTES or len(pieces) >= _PIECES_A_TASK:
                yield place, pieces
                pieces, size = [], 0
    if pieces:
        yield place, pieces


@contextlib.contextmanager
def _explained(packing: Packing) -> Iterator[None]:
    """Says what an interruption leaves behind."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error = Failure(
                f"--out: {packing.folder}: no space left on the disk ({error.strerror}); free some "
                f"(tokens take about half the bytes of their text) and give the same command again."
            )
        if packing.begun:
            print(
                f"{packing.folder} keeps what is packed; the same command continues from there",
                file=sys.stderr,
            )
        raise error from None


def _useful_workers(readers: list[Reader]) -> int:
    sizes = [reader.stored_bytes for reader in readers]
    return cores() if None in sizes else max(1, min(cores(), sum(sizes) // _BYTES_A_WORKER))


def _check_parts(packing: Packing, out: str, held_out: float | None) -> None:
    """No part may be empty."""
    counts = {part: writer.num_documents for part, writer in packing.writers.items()}
    if not any(counts.values()):
        raise packing.skipped.nothing_left()
    for part, count in counts.items():
        if not count:
            raise UserError(
                f"--held-out={held_out} of {sum(counts.values()):,} documents leaves {out}.{part} "
                f"empty; give more documents or another --held-out."
            )
