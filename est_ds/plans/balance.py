"""Spreading kept layers over bands of layers, so that every pipe stage has its share."""

from __future__ import annotations

from est_ds.errors import UserError


def band_lengths(balance_groups: int | list[int], num_layers: int) -> tuple[int, ...]:
    """Lengths of the bands: near-equal for a number, or as listed."""
    if isinstance(balance_groups, list):
        if sum(balance_groups) != num_layers or min(balance_groups) < 1:
            raise UserError(
                f"method.balance_groups={balance_groups}: the lengths must be at least 1 and add "
                f"up to the model's {num_layers} layers, not {sum(balance_groups)}."
            )
        return tuple(balance_groups)
    if not 1 <= balance_groups <= num_layers:
        raise UserError(
            f"method.balance_groups={balance_groups}: use 1 to {num_layers} bands "
            f"(the model has {num_layers} layers), or list their lengths."
        )
    short, longer = divmod(num_layers, balance_groups)
    return tuple(short + (i < longer) for i in range(balance_groups))


def spread(kept: int, lengths: tuple[int, ...], floors: tuple[int, ...], step: int) -> list[int]:
    """How many layers each band keeps: in proportion, the remainder rotating with the step.

    Over any `sum(lengths)` successive steps band i keeps `kept * lengths[i] / sum(lengths)` layers
    on average, exactly, unless a floor lifts it.

    Args:
        kept: layers kept in all.
        lengths: layers of every band.
        floors: the least that a band keeps (at least 1, and its always-kept layers).
    """
    total = sum(lengths)
    turn = step % total
    counts, before, position = [], turn // total, 0
    for length in lengths:
        position += length
        upto = (kept * position + turn) // total
        counts.append(upto - before)
        before = upto
    while any(c < f for c, f in zip(counts, floors)):
        poor = next(i for i, c in enumerate(counts) if c < floors[i])
        rich = max(range(len(counts)), key=lambda i: counts[i] - floors[i])
        counts[poor] += 1
        counts[rich] -= 1
    return counts
