"""What a family file says: where a model keeps its layers, heads and MLP columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from est_ds.plans.plan import Plan
from est_ds.plans.shape import ModelShape
from est_ds.slicing import documents
from est_ds.slicing.leaf import Rows, Skippable, SkippableLayer

Sized = tuple[nn.Module, int]  # a leaf, and how many of its rows or columns one unit has

Mixed = tuple[nn.Module, tuple[Rows, ...]]  # a leaf, and what its rows are


class Follower:
    """An attribute that must follow the number of kept heads and key/value heads, or columns."""

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
        inner_columns: leaves within the part whose input columns are units, and which the part's
            output goes through: rescaled as `columns`, but for the layer's scale.
        qkv_rows: leaves whose output rows are query, then key, then value heads.
        mixed_rows: leaves whose output rows are units among others.
        held: modules whose parameters another forward reads: their rows, as of `mixed_rows`.
        norms: norms over units, each of so many rows.
        informed: other modules that must know the kept heads, with the class that is put before
            their own; it finds them in `est_slice.units`.
        followers: attributes that follow the number of kept heads, or of a state-space mixer's
            columns.
        skippable: modules that compute the part, with the class that is put before their own,
            so that they can be skipped. A part that is skipped hands on the residual stream,
            with the norm behind it where there is one: a layer without its parts is no layer.
    """

    rows: tuple[Sized, ...] = ()
    columns: tuple[Sized, ...] = ()
    group_rows: tuple[Sized, ...] = ()
    inner_columns: tuple[Sized, ...] = ()
    qkv_rows: tuple[Sized, ...] = ()
    mixed_rows: tuple[Mixed, ...] = ()
    held: tuple[Mixed, ...] = ()
    norms: tuple[Sized, ...] = ()
    informed: tuple[tuple[nn.Module, type], ...] = ()
    followers: tuple[Follower, ...] = ()
    skippable: tuple[tuple[nn.Module, type[Skippable]], ...] = ()

    @property
    def modules(self) -> list[nn.Module]:
        """All modules whose class is swapped."""
        sized = self.rows + self.columns + self.group_rows + self.qkv_rows + self.inner_columns
        others = self.mixed_rows + self.held + self.norms + self.informed + self.skippable
        return [module for module, _ in sized + others]


@dataclass(frozen=True)
class Piece:
    """A run of the model that a pipe stage may own alone.

    The output of a piece is the input of the next: a tensor, or a tuple of tensors. The first
    takes token ids, the last returns logits. Where documents are kept apart, the positions of
    the ids in their documents go along as the last of a tuple.

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


# What passes between pieces of a model without a second stream: states, or states and positions.
Passed = Tensor | tuple[Tensor, Tensor]


def taken(x: Passed) -> tuple[Tensor, Tensor | None]:
    """Ids or states, and the positions [B, T] that go along; None where documents are joined."""
    return x if isinstance(x, tuple) else (x, None)


def passed(states: Tensor, positions: Tensor | None) -> Passed:
    """What `taken` takes apart."""
    return states if positions is None else (states, positions)


def causal_mask(
    config: Any, states_BTH: Tensor, positions_BT: Tensor, window: bool = False
) -> Tensor | None:
    """The mask that the library makes of positions, which it finds documents in.

    None where the module's own causal flag does: positions all in one document, and no window or
    one that reaches over the whole sequence. Where attention is computed document by document, the
    numbers of the documents.

    Args:
        config: Hugging Face config of the layer.
        window: whether the layer looks back over a window only.
    """
    from transformers import masking_utils

    if attends_by_document(config):
        return document_numbers(positions_BT)
    make = (
        masking_utils.create_sliding_window_causal_mask
        if window
        else masking_utils.create_causal_mask
    )
    arguments = {
        "config": config,
        "inputs_embeds": states_BTH,
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": positions_BT,
    }
    return shared_mask(positions_BT, make.__name__, lambda: make(**arguments))


def shared_mask(
    positions_BT: Tensor, kind: str, make: Callable[[], Tensor | None]
) -> Tensor | None:
    """A mask that is made once for all layers of a pipe stage: it has B * T * T elements, and every
    layer keeps its own for the backward otherwise."""
    masks = positions_BT.__dict__.setdefault("est_masks", {})
    if kind not in masks:
        masks[kind] = make()
    return masks[kind]


def attends_by_document(config: Any) -> bool:
    """Whether attention is computed document by document (`est_ds/slicing/documents.py`)."""
    return config._attn_implementation == documents.NAME


def document_numbers(positions_BT: Tensor) -> Tensor:
    """What stands in for a mask then, made once for all layers."""
    return shared_mask(positions_BT, "numbers", lambda: documents.numbers_of(positions_BT))


def layer_paths(pieces: list[Piece]) -> dict[int, str]:
    """What the names of each layer's parameters begin with."""
    return {p.layer: f"{p.modules[0]}." for p in pieces if p.layer is not None}


@dataclass(frozen=True)
class SubnetworkSize:
    """What a subnetwork keeps, in the numbers of a Hugging Face config.

    Attributes:
        layers: kept layers, by their index in the plan.
        heads: query heads of every attention.
        key_value_groups: key/value heads of every attention.
        columns: columns of every MLP, or state-space mixer.
    """

    layers: tuple[int, ...]
    heads: int
    key_value_groups: int
    columns: int


class Family(ABC):
    """One family of Hugging Face models.

    Attributes:
        model_types: the library's names for it.
        auto_class: the class of the library that builds the model with its training head.
        attention: the library's attention that the model is built with.
        separable: whether documents of one sequence can be kept apart. The library must then call
            attention by its registered name (`est_ds/slicing/documents.py`).
        extra_keys: keys of the model section that the library takes but does not list.
        skippable: what is put before a layer's class; says what a skipped layer returns.
        head_size_from: the fields of the config that a head's width derives from, where no field
            of its own holds it: a model with fewer heads would have wider ones.
        reused_dropout: paths of dropout modules that are used in several places, and of the
            modules whose results they drop there.
    """

    model_types: ClassVar[tuple[str, ...]]
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    attention: ClassVar[str] = "sdpa"
    separable: ClassVar[bool] = True
    extra_keys: ClassVar[frozenset[str]] = frozenset()
    skippable: ClassVar[type[Skippable]] = SkippableLayer
    head_size_from: ClassVar[str | None] = None
    reused_dropout: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @abstractmethod
    def shape(self, config: Any) -> ModelShape:
        """The shape of the model of a Hugging Face config.

        Raises:
            UserError: the config asks for what the family does not support.
        """

    def check_section(self, section: dict[str, Any]) -> None:
        """Checks the `model` section of a run file where its config no longer tells.

        Raises:
            UserError: two of its keys contradict each other.
        """

    def untie(self, model: nn.Module) -> None:
        """Unties what the library ties against the config; called before weights are tied."""

    def rescale_drawn(self, config: Any, path: str, module: nn.Module) -> None:
        """Rescales the weights of the module at `path`, just drawn as the library draws them,
        where training cannot begin with these."""

    @abstractmethod
    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers, in the order of the shape."""

    @abstractmethod
    def slots(self, layer: nn.Module) -> tuple[Slot, ...]:
        """The leaves of a layer's parts, in the order of the shape's parts."""

    @abstractmethod
    def attentions(self, layer: nn.Module) -> tuple[nn.Module, ...]:
        """The modules of a layer that drop attention probabilities."""

    def idle_parameters(self, layer: nn.Module) -> list[nn.Parameter]:
        """The parameters of a layer that are not used where it is skipped."""
        return list(layer.parameters())

    def read_elsewhere(self, layer: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
        """The parameters of a layer that the forward of another module than their own reads, each
        behind that module: ZeRO 3 must gather them for it."""
        return []

    def named_inputs(self, inputs: tuple[Tensor, ...], config: Any = None) -> dict[str, Tensor]:
        """The arguments of the whole model.

        Args:
            inputs: ids [B, T]; to keep documents apart also the positions of the ids in their
                documents [B, T], which start again at 0 where a document begins.
            config: the model's, if its attention may be computed document by document.
        """
        named = dict(zip(("input_ids", "position_ids"), inputs))
        if len(inputs) > 1 and config is not None and attends_by_document(config):
            named["attention_mask"] = document_numbers(inputs[1])
        return named

    @abstractmethod
    def pieces(self, config: Any) -> list[Piece]:
        """The model as a sequence of pieces, for a pipeline."""

    @abstractmethod
    def resized(self, config: Any, size: SubnetworkSize) -> dict[str, Any]:
        """The fields of the config that change for a model of that size.

        Raises:
            UserError: the config cannot express it.
        """

    def carried_over(self, layers: list[nn.Module], plan: Plan) -> dict[str, Tensor]:
        """Weights of a smaller model that come from other places than its own layers, by name.

        Called while the plan is active on the layers of the full model.

        Raises:
            UserError: the smaller model cannot hold them.
        """
        return {}
