"""Leaf modules that multiply by kept rows or columns only.

A module's class is swapped in place for a subclass of its own class: parameters, names and
state dict stay as they are, and with nothing set the original forward runs.

Shapes: weight [out, in]; a unit is `size` neighbouring rows or columns (a head, or one column).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

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


class SlicedRows:
    """A projection into heads or MLP columns: multiplies by the kept rows of its weight."""

    est_slice: Slice | None = None

    def forward(self, x: Tensor) -> Tensor:
        kept = self.est_slice
        if kept is None:
            return super().forward(x)
        weight = self.weight.view(-1, kept.size * self.in_features)
        weight = weight.index_select(0, kept.units).view(-1, self.in_features)
        bias = self.bias
        if bias is not None:
            bias = bias.view(-1, kept.size).index_select(0, kept.units).view(-1)
        return linear(x, weight, bias)


class SlicedColumns:
    """A projection out of heads or MLP columns: multiplies by the kept columns, and rescales."""

    est_slice: Slice | None = None

    def forward(self, x: Tensor) -> Tensor:
        kept = self.est_slice
        if kept is None:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if kept.units is not None:
            weight = weight.view(self.out_features, -1, kept.size)
            weight = weight.index_select(1, kept.units).view(self.out_features, -1)
        if (factor := kept.scale * kept.output_scale) != 1.0:
            # On the weight rather than on the tokens' outputs: it is the smaller of the two.
            weight = weight * factor
        if bias is not None and kept.output_scale != 1.0:
            bias = bias * kept.output_scale
        return linear(x, weight, bias)


class SkippableLayer:
    """A layer whose forward can be the identity on its first argument."""

    est_skipped: bool = False

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if self.est_skipped:
            return hidden_states
        return super().forward(hidden_states, *args, **kwargs)


def swap_class(module: nn.Module, mixin: type) -> None:
    """Puts `mixin` before the class of `module`."""
    module.__class__ = _mixed(mixin, type(module))


def restore_class(module: nn.Module) -> None:
    """Undoes `swap_class`, and drops what a plan set."""
    module.__class__ = type(module).__mro__[2]
    for name in ("est_slice", "est_skipped"):
        module.__dict__.pop(name, None)


@cache
def _mixed(mixin: type, original: type) -> type:
    # The original name, so that whatever selects modules by class name still finds them.
    return type(original.__name__, (mixin, original), {"__module__": original.__module__})


def indices(units, device: torch.device) -> Tensor | None:
    """A plan's kept units as an index tensor on `device`."""
    return None if units is None else torch.from_numpy(units).to(device, non_blocking=True)
