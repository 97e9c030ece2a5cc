"""Leaf modules that multiply by kept rows or columns only.

A module's class is swapped in place for a subclass of its own class: parameters, names and
state dict stay as they are, and with nothing set the original forward runs.

Shapes: a unit is `size` neighbouring rows or columns of a weight (a head, or one column).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


@dataclass(frozen=True)
class Slice:
    """What a leaf keeps.

    Attributes:
        units: kept units, int64 [k], on the weight's device; None keeps all.
        size: rows or columns of one unit.
        scale: factor on the product (realised n / k).
        output_scale: factor on product and bias (the layer's scale).
    """

    units: Tensor | None
    size: int
    scale: float = 1.0
    output_scale: float = 1.0


@dataclass(frozen=True)
class KeptUnits:
    """Which units of a parameter a plan reads: its gradient is zero elsewhere.

    Attributes:
        dim: along which they lie.
        units: int64 [k], on the parameter's device.
        size: rows or columns of one unit.
    """

    dim: int
    units: Tensor
    size: int

    def shape(self, whole: Tensor) -> list[int]:
        """Of what `take` returns of a tensor that is laid out as the parameter."""
        found = list(whole.shape)
        found[self.dim : self.dim + 1] = [len(self.units), self.size]
        return found

    def take(self, whole: Tensor, out: Tensor) -> None:
        """Copies the kept units of a tensor to `out`, of `shape`."""
        torch.index_select(self._by_unit(whole), self.dim, self.units, out=out)

    def put(self, units: Tensor, whole: Tensor) -> None:
        """Copies units, of `shape`, to their places in a tensor."""
        self._by_unit(whole).index_copy_(self.dim, self.units, units)

    def _by_unit(self, whole: Tensor) -> Tensor:
        return whole.unflatten(self.dim, (-1, self.size))


class Leaf:
    """A linear layer of which a plan keeps some units.

    No ABC, and so is `Skippable`: its metaclass would become that of every swapped module. A
    subclass says what `est_kept` is. `nn.Linear` holds its weight as [out, in], the library's
    `Conv1D` (GPT-2) as [in, out].
    """

    est_slice: Slice | None = None

    @property
    def est_out_dim(self) -> int:
        return 0 if isinstance(self, nn.Linear) else 1

    def est_dims(self) -> dict[str, int]:
        """The dimension along which each parameter's units lie; others are read whole."""
        raise NotImplementedError

    def est_kept(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that the active plan multiplies by, laid out as the whole ones."""
        raise NotImplementedError

    def est_parameters(self) -> dict[str, Tensor]:
        """The same by the names of the parameters."""
        weight, bias = self.est_kept()
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def forward(self, x: Tensor) -> Tensor:
        if self.est_slice is None:
            return super().forward(x)
        weight, bias = self.est_kept()
        return linear(x, weight if self.est_out_dim == 0 else weight.t(), bias)


class SlicedRows(Leaf):
    """A projection into heads or MLP columns: multiplies by the kept rows of its weight."""

    def est_dims(self) -> dict[str, int]:
        return {"weight": self.est_out_dim} | ({} if self.bias is None else {"bias": 0})

    def est_kept(self) -> tuple[Tensor, Tensor | None]:
        kept = self.est_slice
        bias = None if self.bias is None else _keep(self.bias, 0, kept)
        return _keep(self.weight, self.est_out_dim, kept), bias


@dataclass(frozen=True)
class Mask:
    """What a leaf multiplies what it reads by, in place of slicing.

    Attributes:
        values: 1 for what is kept and 0 for all else, [in], in the weight's type and on its
            device; None keeps all.
        scale: factor on what is kept (realised n / k).
        output_scale: factor on product and bias (the layer's scale).
    """

    values: Tensor | None
    scale: float
    output_scale: float


class SlicedColumns(Leaf):
    """A projection out of heads or MLP columns: multiplies by the kept columns, and rescales.

    With a mask it multiplies by all columns, and what it reads by zeros.
    """

    est_mask: Mask | None = None

    def forward(self, x: Tensor) -> Tensor:
        if (mask := self.est_mask) is None:
            return super().forward(x)
        if mask.values is not None:
            x = x * mask.values * mask.scale
        return super().forward(x) * mask.output_scale

    def est_dims(self) -> dict[str, int]:
        return {"weight": 1 - self.est_out_dim}

    def est_kept(self) -> tuple[Tensor, Tensor | None]:
        kept = self.est_slice
        weight, bias = _keep(self.weight, 1 - self.est_out_dim, kept), self.bias
        if (factor := kept.scale * kept.output_scale) != 1.0:
            # On the weight rather than on the tokens' outputs: it is the smaller of the two.
            weight = weight * factor
        if bias is not None and kept.output_scale != 1.0:
            bias = bias * kept.output_scale
        return weight, bias


class Held:
    """A module whose parameters are read as they are, by a forward of its own or another's: whoever
    reads one gets its kept rows."""

    est_slice: Slice | None = None

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        kept = self.est_slice
        if kept is None or not isinstance(found, nn.Parameter):
            return found
        return _keep(found, 0, kept)

    def est_dims(self) -> dict[str, int]:
        return {name: 0 for name, _ in self.named_parameters(recurse=False)}

    def est_parameters(self) -> dict[str, Tensor]:
        """What the active plan keeps, by the names of the parameters."""
        return {name: getattr(self, name) for name, _ in self.named_parameters(recurse=False)}


class NormOfKept(Held):
    """A norm over units, gated or not: it takes the mean over those that are kept.

    Masked, it has zeros for the others; what it reads is scaled by the root of n / k, so that the
    mean over all is that over the kept ones, and what it returns is scaled back.
    """

    est_mask: Mask | None = None

    def forward(self, x: Tensor, *args) -> Tensor:
        if (mask := self.est_mask) is None or mask.values is None:
            return super().forward(x, *args)
        root = mask.scale**0.5
        return super().forward(x * mask.values * root, *args) / root


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a weight, which other rows may follow.

    Attributes:
        number: how many they are.
        size: rows of one unit; 0: no unit's, and always kept.
    """

    number: int
    size: int

    def kept(self, units: Tensor) -> Tensor:
        """The kept ones, from 0 on."""
        if not self.size:
            return torch.arange(self.number, device=units.device)
        of_unit = torch.arange(self.size, device=units.device)
        return (units[:, None] * self.size + of_unit).flatten()


def rows_of(units: Tensor, stretches: tuple[Rows, ...]) -> Tensor:
    """The rows of kept units in a weight whose rows are these, and those that are always kept."""
    found, first = [], 0
    for rows in stretches:
        found.append(first + rows.kept(units))
        first += rows.number
    return torch.cat(found)


def _keep(tensor: Tensor, dim: int, kept: Slice) -> Tensor:
    """The kept units of `dim`, each `kept.size` long."""
    if kept.units is None:
        return tensor
    if kept.size == 1:  # a dimension of one would double the time of the backward
        return tensor.index_select(dim, kept.units)
    units = tensor.unflatten(dim, (-1, kept.size)).index_select(dim, kept.units)
    return units.flatten(dim, dim + 1)


class Skippable:
    """A module that can return at once; `est_skip` says what, in the form of its forward.

    Masked, it computes all the same, and adds zero times its result to what it returns.
    """

    est_skipped: bool = False
    est_masked: bool = False

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if self.est_skipped:
            return self.est_skip(hidden_states, *args, **kwargs)
        computed = super().forward(hidden_states, *args, **kwargs)
        if self.est_masked:
            return self.est_mask_out(computed, self.est_skip(hidden_states, *args, **kwargs))
        return computed

    def est_skip(self, hidden_states: Tensor, *args, **kwargs):
        """What a skipped module returns in place of its own; every kind of module says it."""
        raise NotImplementedError

    def est_mask_out(self, computed, instead):
        """What a masked module returns: `instead`, whose first tensor is of the shape of
        `computed`'s."""
        if isinstance(instead, tuple):
            return (self.est_mask_out(computed[0], instead[0]), *instead[1:])
        return instead + 0 * computed


class SkippableLayer(Skippable):
    """A layer that hands on its first argument, of all positions or of some.

    Attributes:
        est_positions: the positions that pass through it, in order, int64 [k]; None: all do.
    """

    est_positions: Tensor | None = None

    def est_skip(self, hidden_states: Tensor, *args, **kwargs):
        return hidden_states

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if (kept := self.est_positions) is None:
            return super().forward(hidden_states, *args, **kwargs)
        along = {name: _at(kept, value) for name, value in kwargs.items()}
        computed = super().forward(*(_at(kept, x) for x in (hidden_states, *args)), **along)
        return hidden_states.index_copy(1, kept, computed)


def _at(kept: Tensor, value: Any) -> Any:
    """A layer's argument at kept positions: of states, positions and their embeddings
    [B, T, ...] the rows, of a mask [B, 1, T, T] rows and columns, of numbers of documents
    [B, 1, T, 1] the rows."""
    if isinstance(value, tuple):
        return tuple(_at(kept, part) for part in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 4:
        rows = value.index_select(2, kept)
        return rows if value.shape[3] == 1 else rows.index_select(3, kept)
    return value.index_select(1, kept)


class SkippableAttention(Skippable):
    """An attention whose output, before the residual, is nothing."""

    def est_skip(self, hidden_states: Tensor, *args, **kwargs):
        return torch.zeros_like(hidden_states), None


class SkippableMlp(Skippable):
    """An MLP, or a state-space mixer, whose output, before the residual, is nothing."""

    def est_skip(self, hidden_states: Tensor, *args, **kwargs):
        return torch.zeros_like(hidden_states)


def kept_units(module: nn.Module) -> Iterator[tuple[nn.Parameter, KeptUnits]]:
    """The parameters of a module of which the active plan reads some units, and which."""
    if not isinstance(module, (Leaf, Held)):
        return
    if (kept := module.est_slice) is None or kept.units is None:
        return
    own = dict(module.named_parameters(recurse=False))
    for name, dim in module.est_dims().items():
        yield own[name], KeptUnits(dim, kept.units, kept.size)


def swap_class(module: nn.Module, mixin: type) -> None:
    """Puts `mixin` before the class of `module`."""
    module.__class__ = _mixed(mixin, type(module))


def restore_class(module: nn.Module) -> None:
    """Undoes `swap_class`, and drops what a plan set."""
    module.__class__ = type(module).__bases__[1]
    forget(module)


def forget(module: nn.Module) -> None:
    """Drops what a plan set."""
    for name in ("est_slice", "est_mask", "est_skipped", "est_masked", "est_positions"):
        module.__dict__.pop(name, None)


@cache
def _mixed(mixin: type, original: type) -> type:
    # The original name, so that whatever selects modules by class name still finds them.
    return type(original.__name__, (mixin, original), {"__module__": original.__module__})


def indices(units, device: torch.device) -> Tensor | None:
    """A plan's kept units as an index tensor on `device`."""
    return None if units is None else torch.from_numpy(units).to(device, non_blocking=True)


def mask_of(units, total: int, size: int, like: Tensor) -> Tensor | None:
    """A plan's kept units of `total` as zeros and ones, each `size` times, [total * size]."""
    if units is None:
        return None
    values = torch.zeros(total)
    values[torch.from_numpy(units)] = 1.0
    return values.repeat_interleave(size).to(like.device, like.dtype, non_blocking=True)


def fused(units: Tensor, groups: Tensor | None, num_units: int, num_groups: int) -> Tensor:
    """Kept units of a weight that holds query heads, then key heads, then value heads.

    Args:
        groups: kept key/value heads; None keeps all.
    """
    if groups is None:
        groups = torch.arange(num_groups, device=units.device)
    return torch.cat([units, num_units + groups, num_units + num_groups + groups])
