"""What a plan and the FLOPs need to know of a model: layers, their parts, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """One attention sublayer.

    Attributes:
        heads: number of query heads.
        key_value_groups: number of key/value heads (`heads` without grouped-query attention).
        head_dim: width of one head.
        hidden: width of the residual stream that q, k, v read and o writes.
        cross: keys and values come from another sequence (the encoder's output).
    """

    heads: int
    key_value_groups: int
    head_dim: int
    hidden: int
    cross: bool = False

    @property
    def units(self) -> int:
        return self.heads


@dataclass(frozen=True)
class Mlp:
    """One MLP sublayer.

    Attributes:
        columns: inner width.
        hidden: width of the residual stream.
        matrices: weight matrices of `hidden x columns`: 2, or 3 when gated.
    """

    columns: int
    hidden: int
    matrices: int

    @property
    def units(self) -> int:
        return self.columns


Part = Attention | Mlp


@dataclass(frozen=True)
class ModelShape:
    """A model as plans see it.

    Attributes:
        family: Hugging Face `model_type`.
        layers: the parts of every layer, in the order of the plan's layers.
        hidden: width of the residual stream.
        vocabulary: rows of the output head.
        sequence: the longest sequence the model takes, tokens, None if there is no bound; as a
            method sees it, that of the run.
        encoder_layers: how many of the first layers read the source sequence of an
            encoder-decoder; the rest, and the head, read the target sequence. The keys and
            values of a `cross` attention are of the source.
        head_inner: weights of the products between the last layer and the output head.
    """

    family: str
    layers: tuple[tuple[Part, ...], ...]
    hidden: int
    vocabulary: int
    sequence: int | None
    encoder_layers: int = 0
    head_inner: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.layers)
