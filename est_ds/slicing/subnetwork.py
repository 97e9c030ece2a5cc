"""Installs slicing on a model's layers, and makes a plan active for the length of a `with`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from est_ds.plans.plan import Kept, LayerPlan, Plan
from est_ds.plans.shape import ModelShape
from est_ds.slicing.families.base import Family, Slot
from est_ds.slicing.leaf import (
    SkippableLayer,
    Slice,
    SlicedColumns,
    SlicedRows,
    indices,
    restore_class,
    swap_class,
)


class Subnetwork:
    """Slicing installed on some or all layers of a model.

    Args:
        layers: the layers that live in this process, by their index in the plan. A pipe stage
            passes its own; the rest of a plan is then none of its business.
    """

    def __init__(self, family: Family, shape: ModelShape, layers: Mapping[int, nn.Module]) -> None:
        self.shape = shape
        self._layers = dict(layers)
        self._slots = {i: family.slots(layer) for i, layer in self._layers.items()}
        for module in self._layers.values():
            swap_class(module, SkippableLayer)
        for slot in self._all_slots():
            for module, _ in slot.rows + slot.group_rows:
                swap_class(module, SlicedRows)
            for module, _ in slot.columns:
                swap_class(module, SlicedColumns)

    @contextmanager
    def active(self, plan: Plan) -> Iterator[None]:
        """Within, forward and backward use only what the plan keeps; outside, everything.

        Must enclose the whole step: recomputation in the backward needs the same plan.
        """
        if len(plan.layers) != self.shape.num_layers:
            raise ValueError(
                f"the plan has {len(plan.layers)} layers, the model {self.shape.num_layers}"
            )
        try:
            for i, layer in self._layers.items():
                self._set_layer(i, layer, plan.layers[i])
            yield
        finally:
            self._clear()

    def uninstall(self) -> None:
        """Gives every module its own class back."""
        for slot in self._all_slots():
            for module, _ in slot.rows + slot.group_rows + slot.columns:
                restore_class(module)
        for module in self._layers.values():
            restore_class(module)
        self._layers, self._slots = {}, {}

    def _all_slots(self) -> Iterator[Slot]:
        for slots in self._slots.values():
            yield from slots

    def _set_layer(self, i: int, layer: nn.Module, plan: LayerPlan | None) -> None:
        if plan is None:
            layer.est_skipped = True
            return
        for slot, kept, part in zip(self._slots[i], plan.parts, self.shape.layers[i]):
            self._set_slot(slot, kept, plan.scale, getattr(part, "groups", 0))

    @staticmethod
    def _set_slot(slot: Slot, kept: Kept, layer_scale: float, all_groups: int) -> None:
        if kept.units is None and layer_scale == 1.0:
            return
        device = slot.columns[0][0].weight.device
        units, groups = indices(kept.units, device), indices(kept.groups, device)
        if units is not None:
            for module, size in slot.rows:
                module.est_slice = Slice(units, size)
        if groups is not None:
            for module, size in slot.group_rows:
                module.est_slice = Slice(groups, size)
        for module, size in slot.columns:
            module.est_slice = Slice(units, size, kept.scale, layer_scale)
        num_groups = all_groups if kept.groups is None else len(kept.groups)
        for follower in slot.followers:
            follower.set(kept.count, num_groups)

    def _clear(self) -> None:
        for layer in self._layers.values():
            layer.__dict__.pop("est_skipped", None)
        for slot in self._all_slots():
            for module, _ in slot.rows + slot.group_rows + slot.columns:
                module.__dict__.pop("est_slice", None)
            for follower in slot.followers:
                follower.restore()
