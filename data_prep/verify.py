"""Verb `verify`: is a packed corpus what its manifest says, to the last byte?"""

from pathlib import Path

import numpy as np

from data_prep.pack import unigram_entropy
from est_ds.data.indexed import Corpus, file_sha256
from est_ds.data.manifest import manifest_path
from est_ds.errors import UserError

_BLOCK_TOKENS = 1 << 22
_ADVICE = "copy the files again or pack the corpus again with `python -m data_prep pack`."


def verify(prefix: str, tokenizer: Path | None) -> None:
    """Checks a corpus and prints a short report.

    Checked: manifest, sizes, SHA-256 of both files, every entry of the index, every token
    below the vocabulary, token statistics, and the tokenizer where one is given.

    Raises:
        UserError: The first thing found wrong.
    """
    if not manifest_path(prefix).is_file():
        raise UserError(
            f"{manifest_path(prefix)} does not exist, so there is nothing to check against; "
            f"give the --out of `python -m data_prep pack`, or copy the manifest beside the corpus."
        )
    corpus = Corpus.open(prefix)
    manifest = corpus.manifest
    for ending, expected in (("bin", manifest.bin_sha256), ("idx", manifest.idx_sha256)):
        found = file_sha256(Path(f"{prefix}.{ending}"))
        if found != expected:
            raise UserError(
                f"{prefix}.{ending}: sha256 {found[:12]}..., but the manifest has "
                f"{expected[:12]}...: changed since it was packed; {_ADVICE}"
            )
    _check_index(corpus)
    entropy = unigram_entropy(_count_tokens(corpus))
    if abs(entropy - manifest.unigram_entropy) > 1e-9:
        raise UserError(
            f"{manifest_path(prefix)}: unigram_entropy={manifest.unigram_entropy}, but the tokens "
            f"have {entropy}; {_ADVICE}"
        )
    if tokenizer is not None:
        corpus.check_tokenizer(tokenizer)
    print(
        f"{prefix}: ok, {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens "
        f"({manifest.dtype}), vocabulary {corpus.vocabulary:,}, unigram entropy {entropy:.4f} "
        f"nats, fingerprint {corpus.fingerprint}"
    )
    if tokenizer is None:
        print(f"tokenizer not checked (--tokenizer DIR); it has sha256 {corpus.tokenizer_sha256}")


def _check_index(corpus: Corpus) -> None:
    lengths, offsets, boundaries = corpus.header.arrays()
    ends = offsets + lengths.astype(np.int64) * corpus.header.dtype.itemsize
    if (lengths < 0).any() or (ends[:-1] != offsets[1:]).any() or (np.diff(boundaries) < 0).any():
        raise UserError(
            f"{corpus.prefix}.idx: its entries do not follow one another without a gap; {_ADVICE}"
        )


def _count_tokens(corpus: Corpus) -> np.ndarray:
    counts = np.zeros(corpus.vocabulary, np.int64)
    for start in range(0, corpus.num_tokens, _BLOCK_TOKENS):
        tokens = corpus.window(start, min(_BLOCK_TOKENS, corpus.num_tokens - start))
        if tokens.min() < 0 or tokens.max() >= corpus.vocabulary:
            raise UserError(
                f"{corpus.prefix}.bin: token {int(tokens.max())} is outside the vocabulary "
                f"{corpus.vocabulary} of the manifest; {_ADVICE}"
            )
        counts += np.bincount(tokens, minlength=corpus.vocabulary)
    return counts
