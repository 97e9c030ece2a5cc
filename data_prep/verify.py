"""Verb `verify`: is a packed corpus what its manifest says, to the last byte?"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.audit import AGAIN, Audit, audit_shard
from data_prep.packing import unigram_entropy
from data_prep.tokenizing import cores
from est_ds.data.indexed import Corpus, check_shard_hashes
from est_ds.data.manifest import Shard, manifest_path
from est_ds.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Attributes: largest share of unknown tokens, and fewest bytes of text a token."""

    max_unknown: float = 0.01
    min_bytes_per_token: float = 1.0


@dataclass(frozen=True)
class _Made:
    """How a corpus was made: by its manifest, or by what a tokenizer does."""

    vocabulary: int
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None


def verify(prefix: str, tokenizer: Path | None, workers: int | None, limits: Limits) -> None:
    """Checks a corpus and prints a short report.

    Checked: manifest, sizes, SHA-256 of all files, every entry of the index, every token
    below the vocabulary, token statistics, BOS and EOS around every document and nowhere else,
    the share of unknown tokens, bytes a token, and the tokenizer where one is given. Of a corpus
    without a manifest: what can be, by the tokenizer.

    Args:
        workers: processes that read shards; None: one for each core.

    Raises:
        UserError: The first thing found wrong.
    """
    if workers is None:
        workers = cores()
    if workers < 1:
        raise UserError(f"--workers={workers} is not allowed; use at least 1.")
    for ending in (".bin", ".idx", ".manifest.json"):
        if prefix.endswith(ending) and Path(prefix).is_file():
            raise UserError(f"--out {prefix}: give the prefix: {prefix.removesuffix(ending)}")
    if not manifest_path(prefix).is_file() and tokenizer is None:
        raise UserError(
            f"{manifest_path(prefix)} does not exist, so there is nothing to check against; "
            f"give the --out of `python -m data_prep pack`, copy the manifest beside the corpus, "
            f"or give the --tokenizer of a corpus made elsewhere."
        )
    corpus = Corpus.open(prefix)
    if tokenizer is not None:
        corpus.check_tokenizer(tokenizer)
    made = _made(corpus, tokenizer)
    audit = _audit(corpus, made, workers)
    entropy = unigram_entropy(audit.counts)
    if corpus.manifest and abs(entropy - corpus.manifest.unigram_entropy) > 1e-9:
        raise UserError(
            f"{manifest_path(prefix)}: unigram_entropy={corpus.manifest.unigram_entropy}, but the "
            f"tokens have {entropy}; {AGAIN}"
        )
    lines = _check_surroundings(corpus, made, audit)
    lines += _check_density(corpus, made, audit, limits)
    shards = f" in {len(corpus.shards)} shards" if len(corpus.shards) > 1 else ""
    print(
        f"{prefix}: ok, {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens{shards} "
        f"({corpus.shards[0].header.dtype.name}), vocabulary {made.vocabulary:,}, unigram entropy "
        f"{entropy:.4f} nats, fingerprint {corpus.fingerprint}"
    )
    print("; ".join(lines))
    if corpus.manifest is None:
        print("no manifest: hashes, and whether this tokenizer made it, could not be checked")
    elif tokenizer is None:
        print(f"tokenizer not checked (--tokenizer DIR); it has sha256 {corpus.tokenizer_sha256}")


def _made(corpus: Corpus, tokenizer: Path | None) -> _Made:
    if corpus.manifest is not None:
        of = corpus.manifest
    else:
        from est_ds.data.encoders import load_encoder

        of = load_encoder(tokenizer)
    return _Made(of.vocabulary, of.bos_id, of.eos_id, of.unknown_id)


def _audit(corpus: Corpus, made: _Made, workers: int) -> Audit:
    """All shards, several at a time."""
    audit = Audit(np.zeros(made.vocabulary, np.int64))
    shards = corpus.manifest.shards if corpus.manifest else [None]
    task = partial(_audit_shard, corpus.prefix, made)
    workers = min(workers, len(shards))
    if workers == 1:
        for shard in shards:
            audit += task(shard)
        return audit
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for part in pool.map(task, shards):
            audit += part
    return audit


def _audit_shard(prefix: str, made: _Made, shard: Shard | None) -> Audit:
    if shard is not None:
        check_shard_hashes(prefix, shard)
        prefix += shard.suffix
    return audit_shard(prefix, made.vocabulary, made.bos_id, made.eos_id)


def _check_surroundings(corpus: Corpus, made: _Made, audit: Audit) -> list[str]:
    """BOS and EOS stand around every document (of a corpus made elsewhere: or around none) once,
    and nowhere else."""
    lines = []
    for name, side, id_, right, twice in (
        ("BOS", "start with", made.bos_id, audit.start_right, audit.start_twice),
        ("EOS", "end with", made.eos_id, audit.end_right, audit.end_twice),
    ):
        if id_ is None:
            lines.append(f"no {name} around documents")
            continue
        share = f"{_share(right, audit.documents)} of the documents {side} {name} ({id_})"
        lines.append(share)
        expected = right if corpus.manifest is None and right == 0 else audit.documents
        if right != expected:
            raise UserError(
                f"corpus {corpus.prefix}: only {share}, but {expected - right:,} documents do not; "
                f"pack it again, so that all of them do, or none."
            )
        if twice:
            raise UserError(
                f"corpus {corpus.prefix}: {twice:,} documents {side} two {name} ({id_}): both the "
                f"tokenizer and the packing put one; pack it again with one of them."
            )
        inside = int(audit.counts[id_]) - right
        if made.bos_id != made.eos_id and right and inside:
            raise UserError(
                f"corpus {corpus.prefix}: {name} ({id_}) stands {inside:,} times inside documents, "
                f"where a model takes it for a boundary; pack it again with "
                f"`python -m data_prep pack`, which reads such text as text."
            )
    return lines


def _check_density(corpus: Corpus, made: _Made, audit: Audit, limits: Limits) -> list[str]:
    lines = []
    if made.unknown_id is not None:
        unknown = int(audit.counts[made.unknown_id])
        # GPT-2's unknown token is its EOS, which was put there on purpose.
        for id_, put in ((made.bos_id, audit.start_right), (made.eos_id, audit.end_right)):
            unknown -= put if id_ == made.unknown_id else 0
        lines.append(f"{_share(unknown, corpus.num_tokens)} of the tokens unknown")
        if unknown > limits.max_unknown * corpus.num_tokens:
            raise UserError(
                f"corpus {corpus.prefix}: {lines[-1]} ({made.unknown_id}), more than "
                f"--max-unknown={limits.max_unknown}; use a tokenizer made for such text, or one "
                f"with bytes for what it does not know."
            )
    if corpus.manifest:
        around = (made.bos_id is not None) + (made.eos_id is not None)
        tokens = corpus.num_tokens - around * corpus.num_documents
        density = corpus.manifest.text_bytes / max(1, tokens)
        lines.append(f"{density:.3f} bytes a token of text")
        if density < limits.min_bytes_per_token:
            raise UserError(
                f"corpus {corpus.prefix}: {lines[-1]}, fewer than "
                f"--min-bytes-per-token={limits.min_bytes_per_token}; use a tokenizer made for "
                f"such text."
            )
    return lines


def _share(part: int, whole: int) -> str:
    """A percentage that is 100 % or 0 % only if it is exactly so."""
    if part in (0, whole):
        return "100 %" if part else "0 %"
    return f"{min(max(100 * part / whole, 0.0001), 99.9999):.4f} %"
