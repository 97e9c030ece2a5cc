"""Batches and windows from settings in any mixture, for tests that change one of them."""

from __future__ import annotations

from dataclasses import fields

from est_ds.data.loader import Batches, Ordering, Sampling, Windows

OF_SAMPLES, OF_ORDER = ({f.name for f in fields(kind)} for kind in (Sampling, Ordering))


def batches_of(corpora, **given) -> Batches:
    ordering = {k: v for k, v in given.items() if k in OF_ORDER}
    sampling = {k: v for k, v in given.items() if k not in OF_ORDER}
    return Batches(corpora, Sampling(**sampling), Ordering(**ordering))


def windows_of(corpus, **given) -> Windows:
    other = {k: v for k, v in given.items() if k not in OF_SAMPLES}
    return Windows(corpus, Sampling(**{k: given[k] for k in given.keys() & OF_SAMPLES}), **other)
