"""Parameters of the pieces that a pipe stage may own, and of stages. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PieceSize:
    """Parameters of a piece of the model, in the order of the family's pieces.

    Attributes:
        layer: its index among the plan's layers, if it is one.
        own: parameters that no other piece has.
        shared: parameters that other pieces hold too, by the name of what they are tied to.
    """

    layer: int | None
    own: int
    shared: Mapping[str, int] = field(default_factory=dict)


def total_parameters(pieces: Sequence[PieceSize]) -> int:
    """Parameters of the model; a tied one counts once."""
    shared = {name: count for piece in pieces for name, count in piece.shared.items()}
    return sum(piece.own for piece in pieces) + sum(shared.values())


def layer_parameters(pieces: Sequence[PieceSize]) -> int:
    """Parameters of all layers."""
    return sum(piece.own for piece in pieces if piece.layer is not None)


def pipe_stage_pieces(pieces: Sequence[PieceSize], cuts: Sequence[int]) -> list[list[PieceSize]]:
    """The pieces of every pipe stage.

    Args:
        cuts: ends of the layer ranges of the stages.
    """
    starts = set(cuts[:-1])
    stages: list[list[PieceSize]] = [[]]
    for piece in pieces:
        if piece.layer in starts:
            stages.append([])
        stages[-1].append(piece)
    return stages


def pipe_stage_parameters(pieces: Sequence[PieceSize], cuts: Sequence[int]) -> tuple[int, ...]:
    """Parameters of every pipe stage; a tied one counts on every stage that holds it."""
    return tuple(total_parameters(stage) for stage in pipe_stage_pieces(pieces, cuts))
