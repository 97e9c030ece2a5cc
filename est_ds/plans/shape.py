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


@dataclass(frozen=True)
class StateSpace:
    """One state-space mixer: Mamba's, of inner channels, or Mamba2's, of heads.

    Attributes:
        columns: inner channels, or heads.
        width: inner channels of one of them: 1, or the width of a head.
        groups: sets of neighbouring columns that read one B and one C, and are normed together
            (1 for Mamba).
        state: values of the state of a channel, and of a B and a C.
        hidden: width of the residual stream.
        step_rank: width of the projection that step sizes are made of (Mamba); None: every head
            has one number of its own projected (Mamba2).
        chunk: positions that Mamba2's scan takes at once; None: one by one (Mamba).
    """

    columns: int
    width: int
    groups: int
    state: int
    hidden: int
    step_rank: int | None = None
    chunk: int | None = None

    @property
    def units(self) -> int:
        return self.columns


Part = Attention | Mlp | StateSpace


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

    @property
    def has_attention(self) -> bool:
        """Whether there are heads of an attention to drop."""
        return any(isinstance(part, Attention) for layer in self.layers for part in layer)

    @property
    def has_state_space(self) -> bool:
        """Whether layers carry a state from position to position."""
        return any(isinstance(part, StateSpace) for layer in self.layers for part in layer)
