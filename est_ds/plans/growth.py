"""Growth of a model's depth at a step, a pure value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """What happens to layers before a step is trained.

    Layers are numbered by their place in the full model. All copies read what was there before
    any of them is written.

    Attributes:
        copies: for every layer that takes over another's weights, that other layer.
        fresh: layers that start anew as the identity: drawn as at the start of the run, their
            output projections zero, their moments zero.
        without_moments: layers among the targets of `copies` that start with zero moments; the
            others take over AdamW's moments too.
    """

    copies: dict[int, int]
    fresh: tuple[int, ...]
    without_moments: frozenset[int] = frozenset()
