"""Pieces of sources into tokens: in this process, or in many that are fed in order."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from data_prep.readers.base import Piece, Place, Rules, Skipped
from est_ds.data.encoders import Encoder
from est_ds.errors import Failure

# Tasks under way, of each worker: one in work and one that waits.
_AHEAD = 2
_MAX_TOKENS = 2**31 - 1  # the index has 32 bits for the length of a document


@dataclass(frozen=True)
class Job:
    """What all tasks have in common.

    Attributes:
        held_out: share of the documents that go to the part `valid` instead of `train`; None for
            one part, `all`.
    """

    encoder: Encoder
    bos_id: int | None
    eos_id: int | None
    dtype: np.dtype
    held_out: float | None
    rules: Rules

    @property
    def parts(self) -> tuple[str, ...]:
        return ("all",) if self.held_out is None else ("train", "valid")


@dataclass
class Packed:
    """Documents of one part as tokens.

    Attributes:
        tokens: all documents, one after the other [tokens].
        lengths: tokens of every document, int32 [documents].
        counts: how often every token occurs, int64 [vocabulary].
    """

    tokens: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    text_bytes: int


@dataclass
class Result:
    """A task done: the tokens of every part."""

    parts: dict[str, Packed]
    skipped: Skipped = field(default_factory=Skipped)


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_held_out(text: str, share: float) -> bool:
    """A function of the text alone: order, other documents and copies make no difference.

    Identical texts fall on the same side, so no copy of a training document is held out.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def tokenize(job: Job, pieces: list[Piece]) -> Result:
    """Parses, splits and encodes the documents of some pieces."""
    result = Result({})
    texts: dict[str, list[str]] = {part: [] for part in job.parts}
    names: dict[str, list[str]] = {part: [] for part in job.parts}
    for piece in pieces:
        for document in piece.documents(job.rules, result.skipped):
            if not document.text.strip():
                result.skipped.add("empty", document.id)
                continue
            part = job.parts[0]
            if job.held_out is not None and is_held_out(document.text, job.held_out):
                part = "valid"
            texts[part].append(document.text)
            names[part].append(document.id)
    for part in job.parts:
        result.parts[part] = _encode(job, texts[part], names[part], result.skipped)
    return result


def _encode(job: Job, texts: list[str], names: list[str], skipped: Skipped) -> Packed:
    around = (job.bos_id is not None) + (job.eos_id is not None)
    encoded, text_bytes = [], 0
    for text, name, ids in zip(texts, names, job.encoder.encode(texts), strict=True):
        if not ids:
            skipped.add("without a token", name)
        elif len(ids) + around > _MAX_TOKENS:
            skipped.add("too long", name)
        else:
            encoded.append(ids)
            text_bytes += len(text.encode())
    lengths = np.array([len(ids) + around for ids in encoded], np.int32)
    tokens = np.empty(int(lengths.sum(dtype=np.int64)), job.dtype)
    at = 0
    for ids in encoded:
        if job.bos_id is not None:
            tokens[at] = job.bos_id
            at += 1
        tokens[at : at + len(ids)] = ids
        at += len(ids)
        if job.eos_id is not None:
            tokens[at] = job.eos_id
            at += 1
    counts = np.bincount(tokens, minlength=job.encoder.vocabulary)
    return Packed(tokens, lengths, counts, text_bytes)


def tokenized(
    tasks: Iterable[tuple[Place, list[Piece]]], job: Job, workers: int
) -> Iterator[tuple[Place, Result]]:
    """Results of tasks, in the order of the tasks, each with the place where its pieces end.

    Holds no more than a few tasks for each worker at a time.

    Raises:
        UserError: A document cannot be read.
        Failure: A worker died.
    """
    # Tokenizers of Hugging Face would start threads of their own in every process.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if workers == 1:
        for place, pieces in tasks:
            yield place, tokenize(job, pieces)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(job,),
    )
    try:
        running: deque = deque()
        for place, pieces in tasks:
            running.append((place, pool.submit(_work, pieces)))
            if len(running) >= _AHEAD * workers:
                done, future = running.popleft()
                yield done, future.result()
        for done, future in running:
            yield done, future.result()
    except BrokenProcessPool:
        raise Failure(
            f"one of the {workers} worker processes died, as they do when memory is short; the "
            f"same command continues where this one stopped, with fewer --workers if need be."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_job: Job


def _start_worker(job: Job) -> None:
    global _job
    _job = job
    # Ctrl-C goes to the whole group; the process that feeds this one ends it in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(pieces: list[Piece]) -> Result:
    return tokenize(_job, pieces)
