"""What a family file says: where a model keeps its layers, heads and MLP columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from est_ds.plans.shape import ModelShape

Sized = tuple[nn.Module, int]  # a leaf, and how many of its rows or columns one unit has


class Follower:
    """An attribute that must follow the number of kept heads and key/value heads."""

    def __init__(self, module: nn.Module, name: str, value: Callable[[int, int], Any]) -> None:
        self._module, self._name, self._value = module, name, value
        self._original = getattr(module, name)

    def set(self, heads: int, groups: int) -> None:
        setattr(self._module, self._name, self._value(heads, groups))

    def restore(self) -> None:
        setattr(self._module, self._name, self._original)


@dataclass(frozen=True)
class Slot:
    """The leaves of one part of a layer, in the order of the layer's parts.

    Attributes:
        rows: leaves whose output rows are heads or columns (q; gate, up).
        group_rows: leaves whose output rows are key/value heads (k, v).
        columns: leaves whose input columns are heads or columns (o; down).
    """

    rows: tuple[Sized, ...]
    columns: tuple[Sized, ...]
    group_rows: tuple[Sized, ...] = ()
    followers: tuple[Follower, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A run of the model that a pipe stage may own alone.

    Attributes:
        modules: the modules it holds, by their path in the model.
        layer: its index among the plan's layers, if it is one.
        forward: called with the modules (in order) and the input of the piece.
    """

    modules: tuple[str, ...]
    forward: Callable[..., Any]
    layer: int | None = None


class Family(ABC):
    """One family of Hugging Face models."""

    model_types: ClassVar[tuple[str, ...]]

    @abstractmethod
    def shape(self, config: Any) -> ModelShape:
        """The shape of the model of a Hugging Face config."""

    @abstractmethod
    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers, in the order of the shape."""

    @abstractmethod
    def slots(self, layer: nn.Module) -> tuple[Slot, ...]:
        """The leaves of a layer's parts, in the order of the shape's parts."""

    @abstractmethod
    def pieces(self, config: Any) -> list[Piece]:
        """The model as a sequence of pieces, for a pipeline."""
