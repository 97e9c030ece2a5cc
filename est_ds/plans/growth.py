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
        new: layers that copy nothing: drawn as at the start of the run, their moments zero.
        new_are_identity: the new layers' output projections are zero.
        without_moments: layers among the targets of `copies` that start with zero moments; the
            others take over AdamW's moments too.
    """

    copies: dict[int, int]
    new: tuple[int, ...] = ()
    new_are_identity: bool = False
    without_moments: frozenset[int] = frozenset()
