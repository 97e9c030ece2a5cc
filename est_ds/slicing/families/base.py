"""What a family file says: where a model keeps its layers, heads and MLP columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from est_ds.plans.shape import ModelShape
from est_ds.slicing.leaf import Skippable, SkippableLayer

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
    """The leaves of one part of a layer.

    Attributes:
        rows: leaves whose output rows are heads or columns (q; gate, up).
        columns: leaves whose input columns are heads or columns (o; down).
        group_rows: leaves whose output rows are key/value heads (k, v).
        qkv_rows: leaves whose output rows are query, then key, then value heads.
        informed: other modules that must know the kept heads, with the class that is put before
            their own; it finds them in `est_slice.units`.
        followers: attributes that follow the number of kept heads.
        skippable: modules that compute the part, with the class that is put before their own,
            so that they can be skipped. A part that is skipped hands on the residual stream,
            with the norm behind it where there is one: a layer without its parts is no layer.
    """

    rows: tuple[Sized, ...] = ()
    columns: tuple[Sized, ...] = ()
    group_rows: tuple[Sized, ...] = ()
    qkv_rows: tuple[Sized, ...] = ()
    informed: tuple[tuple[nn.Module, type], ...] = ()
    followers: tuple[Follower, ...] = ()
    skippable: tuple[tuple[nn.Module, type[Skippable]], ...] = ()

    @property
    def modules(self) -> list[nn.Module]:
        """All modules whose class is swapped."""
        sized = self.rows + self.columns + self.group_rows + self.qkv_rows
        return [module for module, _ in sized + self.informed + self.skippable]


@dataclass(frozen=True)
class Piece:
    """A run of the model that a pipe stage may own alone.

    The output of a piece is the input of the next: a tensor, or a tuple of tensors. The first
    takes token ids, the last returns logits.

    Attributes:
        modules: the modules it holds, by their path in the model.
        forward: called with the modules (in order) and the input of the piece.
        layer: its index among the plan's layers, if it is one.
        tied: parameters of the piece that other pieces hold too: own name -> common name.
            Pieces with the same common name hold copies of one parameter, whose gradient is
            the sum of theirs.
    """

    modules: tuple[str, ...]
    forward: Callable[..., Any]
    layer: int | None = None
    tied: Mapping[str, str] = field(default_factory=dict)


def tied_to(source: str | None, own: str) -> dict[str, str]:
    """The `tied` of a piece whose parameter `own` is `source`; nothing where source is None."""
    return {} if source is None else {own: source}


class Family(ABC):
    """One family of Hugging Face models.

    Attributes:
        model_types: the library's names for it.
        auto_class: the class of the library that builds the model with its training head.
        extra_keys: keys of the model section that the library takes but does not list.
        skippable: what is put before a layer's class; says what a skipped layer returns.
    """

    model_types: ClassVar[tuple[str, ...]]
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    extra_keys: ClassVar[frozenset[str]] = frozenset()
    skippable: ClassVar[type[Skippable]] = SkippableLayer

    @abstractmethod
    def shape(self, config: Any) -> ModelShape:
        """The shape of the model of a Hugging Face config.

        Raises:
            UserError: the config asks for what the family does not support.
        """

    @abstractmethod
    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers, in the order of the shape."""

    @abstractmethod
    def slots(self, layer: nn.Module) -> tuple[Slot, ...]:
        """The leaves of a layer's parts, in the order of the shape's parts."""

    @abstractmethod
    def pieces(self, config: Any) -> list[Piece]:
        """The model as a sequence of pieces, for a pipeline."""
