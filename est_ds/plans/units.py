"""Which heads and MLP columns of a kept layer are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from est_ds.plans import draw
from est_ds.plans.plan import Kept
from est_ds.plans.shape import Attention, Part, StateSpace

HeadRule = Literal["within_groups", "groups"]
Counts = Literal["exact", "bernoulli"]


def exact_count(fraction: float, n: int) -> int:
    """round(fraction * n), at least 1 (halves go to the even count, as Python rounds)."""
    return max(1, round(fraction * n))


@dataclass(frozen=True)
class UnitDraw:
    """How the units of one part are drawn: `fraction` of `size` in each of `rows` equal rows.

    A row is the set from which a draw is uniform: an MLP's columns, the query heads of one
    key/value group (`within_groups`), the key/value groups themselves (`groups`), or the columns
    of one group of a state-space mixer. Every row keeps the same number, since attention needs
    equally many query heads in each group kept, and Mamba2 equally many heads.

    Attributes:
        part: the part drawn from.
        block: heads that a unit of the row stands for: 1, or the query heads of a group.
        with_groups: the units of the row are key/value groups.
    """

    part: Part
    rows: int
    size: int
    fraction: float
    counts: Counts
    block: int = 1
    with_groups: bool = False

    @property
    def takes_effect(self) -> bool:
        """False if rounding keeps every unit although the fraction is below 1."""
        if self.fraction == 1.0 or self.counts == "bernoulli":
            return True
        return exact_count(self.fraction, self.size) < self.size

    @property
    def lifted(self) -> bool:
        """True if every one of several rows keeps a unit though rounding says none: together they
        would keep more than `round(fraction * n)` of the part's n units."""
        few = self.rows > 1 and self.counts == "exact"
        return few and round(self.fraction * self.size) == 0

    @property
    def expected(self) -> tuple[float, float]:
        """Mean kept units and key/value groups (0 for an MLP); exact where counts are."""
        p, n = self.fraction, self.size
        if self.counts == "exact":
            kept: float = exact_count(p, n)
        else:
            kept = n * p + (1 - p) ** n  # an empty draw keeps one
        units = self.rows * kept * self.block
        if not isinstance(self.part, Attention):
            return units, 0
        return units, kept if self.with_groups else self.part.key_value_groups

    def kept(self, address: draw.Address, kind: int, layer: int) -> Kept:
        """The draw at an address, for one layer.

        With Bernoulli counts every unit of the first row is kept with probability `fraction`
        (the likeliest one if none is), and the other rows keep as many, uniformly.
        """
        total = self.part.units
        if self.fraction == 1.0:
            return Kept(None, total)
        keys = address.keys(kind, layer, self.rows * self.size)
        if self.counts == "exact":
            count = exact_count(self.fraction, self.size)
        else:
            count = max(1, int(draw.below(keys[: self.size], self.fraction).sum()))
        if count == self.size:
            return Kept(None, total)
        if self.rows == 1:
            units = draw.smallest(keys, count)
        else:
            units = draw.smallest_per_group(keys.reshape(self.rows, self.size), count)
        groups = units if self.with_groups else None
        if self.block > 1:
            units = (units[:, None] * self.block + np.arange(self.block)).reshape(-1)
        return Kept(units, total, key_value_groups=groups)


def unit_draw(
    part: Part, *, heads: float, columns: float, head_rule: HeadRule, counts: Counts
) -> UnitDraw:
    """How `part` is drawn when a fraction of `heads` or of `columns` is kept.

    Without grouped-query attention (every head has its own key and value) both head rules drop
    a head with its key and value.
    """
    if isinstance(part, StateSpace):
        return UnitDraw(part, part.groups, part.columns // part.groups, columns, counts)
    if not isinstance(part, Attention):
        return UnitDraw(part, 1, part.columns, columns, counts)
    per_group = part.heads // part.key_value_groups
    if head_rule == "groups" or per_group == 1:
        return UnitDraw(
            part, 1, part.key_value_groups, heads, counts, block=per_group, with_groups=True
        )
    return UnitDraw(part, part.key_value_groups, per_group, heads, counts)


def skipped_part(part: Part) -> Kept:
    """The part that contributes nothing in a layer of which another part is kept."""
    nothing = np.arange(0)
    return Kept(
        nothing, part.units, key_value_groups=nothing if isinstance(part, Attention) else None
    )
