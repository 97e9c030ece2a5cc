"""Shapes, schedules and what plans are held to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from est_ds.plans.methods import build_method
from est_ds.plans.shape import Attention, Mlp, ModelShape

GOLDEN = Path(__file__).parents[1] / "golden"


def shape_of(layers: int, heads: int = 8, groups: int = 4, columns: int = 24) -> ModelShape:
    """A small decoder; groups == heads is multi-head attention with a plain MLP."""
    hidden = 4 * heads
    attention = Attention(heads, groups, 4, hidden)
    mlp = Mlp(columns, hidden, 2 if groups == heads else 3)
    return ModelShape("llama", ((attention, mlp),) * layers, hidden, 64, 32)


TINYLLAMA = ModelShape(
    "llama", ((Attention(32, 4, 64, 2048), Mlp(5632, 2048, 3)),) * 22, 2048, 32000, 2048
)
GPT2 = ModelShape("gpt2", ((Attention(12, 12, 64, 768), Mlp(3072, 768, 2)),) * 12, 768, 50257, 1024)


def encoder(layers: int, hidden: int) -> ModelShape:
    heads = hidden // 64
    parts = (Attention(heads, heads, 64, hidden), Mlp(4 * hidden, hidden, 2))
    return ModelShape("bert", (parts,) * layers, hidden, 30522, 512)


BERT, UL2 = encoder(12, 768), encoder(24, 2048)


def est(shape: ModelShape, *, seed: int = 7, steps: int = 100, phases=None, **settings):
    if phases is None:
        phases = [dict(until=1.0, layers=0.5, heads=0.5, columns=0.5)]
    section = dict(name="est", phases=phases, **settings)
    return build_method(section, seed=seed, steps=steps, shape=shape)


def assert_uniform(counts, sizes, n) -> None:
    """Chi-square of how often each of n units was kept, when step s kept `sizes[s]` of them."""
    shares = np.asarray(sizes) / n
    statistic = ((counts - shares.sum()) ** 2).sum() / (shares * (1 - shares)).sum() * (n - 1) / n
    # Six deviations of a chi-square with n - 1 degrees of freedom, and no suspicious evenness.
    assert n / 50 < statistic < (n - 1) + 6 * (2 * (n - 1)) ** 0.5, (statistic, counts)


PHASES = [
    dict(until=0.25, layers=0.5, heads=0.5, columns=0.5),
    dict(until=0.5, heads=0.5, columns=0.5),
    dict(until=1.0),
]


def digests(shape: ModelShape, section: dict, seed: int = 11) -> dict[str, str]:
    """Digests at the edges of the phases and between, of a run of a thousand steps."""
    method = build_method(section, seed=seed, steps=1000, shape=shape)
    return {str(s): method.plan(s).digest for s in (0, 1, 2, 249, 250, 251, 499, 500, 999)}
