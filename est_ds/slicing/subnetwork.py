"""Installs slicing on a model's layers, and makes a plan active for the length of a `with`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from est_ds.plans.plan import Kept, LayerPlan, Plan, StepPlans
from est_ds.plans.shape import Attention, ModelShape, Part
from est_ds.slicing.families.base import Family, Slot
from est_ds.slicing.leaf import (
    Held,
    KeptUnits,
    Mask,
    NormOfKept,
    Slice,
    SlicedColumns,
    SlicedRows,
    forget,
    fused,
    indices,
    kept_units,
    mask_of,
    restore_class,
    rows_of,
    swap_class,
)


@dataclass(frozen=True)
class Turn:
    """What is being trained.

    Attributes:
        step: optimizer step, from 0.
        micro_batch: index in the global batch, the same in every layout.
    """

    step: int
    micro_batch: int


class Subnetwork:
    """Slicing installed on some or all layers of a model.

    Args:
        layers: the layers that live in this process, by their index in the plan. A pipe stage
            passes its own; the rest of a plan is then none of its business.
        masked: what a plan leaves out is computed all the same, and multiplied by zero.

    Attributes:
        turn: the micro-batch whose forward, backward or recomputation runs; None outside training.
    """

    def __init__(
        self,
        family: Family,
        shape: ModelShape,
        layers: Mapping[int, nn.Module],
        masked: bool = False,
    ) -> None:
        self.shape, self.masked = shape, masked
        self.turn: Turn | None = None
        self._plans: StepPlans | None = None
        self._family, self._layers = family, dict(layers)
        self._slots = {i: family.slots(layer) for i, layer in self._layers.items()}
        for module in self._layers.values():
            swap_class(module, family.skippable)
        for slot in self._all_slots():
            for module, _ in slot.rows + slot.group_rows + slot.qkv_rows + slot.mixed_rows:
                swap_class(module, SlicedRows)
            for module, _ in slot.columns + slot.inner_columns:
                swap_class(module, SlicedColumns)
            for module, _ in slot.held:
                swap_class(module, Held)
            for module, _ in slot.norms:
                swap_class(module, NormOfKept)
            for module, mixin in slot.informed + slot.skippable:
                swap_class(module, mixin)

    @contextmanager
    def active(self, plan: Plan | StepPlans) -> Iterator[None]:
        """Within, forward and backward use only what the plan keeps; outside, everything.

        Must enclose the whole step: recomputation in the backward needs the same plan. Of a step
        whose micro-batches have plans of their own, `turn_to` chooses one.
        """
        self._plans = (
            plan if isinstance(plan, StepPlans) else StepPlans(plan.step, 1, lambda _: plan)
        )
        try:
            if len(self._plans) == 1:
                self._set(self._plans[0])
            yield
        finally:
            self._clear()
            self._plans = self.turn = None

    def turn_to(self, micro_batch: int) -> None:
        """Says whose forward, backward or recomputation comes next, and makes its plan active.

        Args:
            micro_batch: index in the global batch.
        """
        turn = Turn(self._plans.step, micro_batch)
        if turn != self.turn and len(self._plans) > 1:
            self._clear()
            self._set(self._plans[micro_batch])
        self.turn = turn

    def idle_parameters(self) -> list[nn.Parameter]:
        """Parameters of this process that no plan of the step uses, in any micro-batch.

        A layer of which a plan keeps a part counts whole.
        """
        if self.masked:
            return []
        idle = set(self._layers)
        for plan in self._plans:
            idle.difference_update(plan.kept_layers)
            if not idle:
                break
        return [p for i in sorted(idle) for p in self._family.idle_parameters(self._layers[i])]

    def kept_units(self) -> dict[nn.Parameter, KeptUnits]:
        """The parameters of which the step reads some units alone, and these.

        None where micro-batches have plans of their own, which together may read all.
        """
        if self._plans is None or len(self._plans) > 1:
            return {}
        modules = (module for slot in self._all_slots() for module in slot.modules)
        return dict(pair for module in modules for pair in kept_units(module))

    def _set(self, plan: Plan) -> None:
        if len(plan.layers) != self.shape.num_layers:
            raise ValueError(
                f"the plan has {len(plan.layers)} layers, the model {self.shape.num_layers}"
            )
        for i, layer in self._layers.items():
            self._set_layer(i, layer, plan.layers[i])

    @property
    def skipped(self) -> tuple[nn.Module, ...]:
        """The layers and parts that do not run under the active plan."""
        parts = [module for slot in self._all_slots() for module, _ in slot.skippable]
        return tuple(m for m in [*self._layers.values(), *parts] if m.est_skipped)

    def uninstall(self) -> None:
        """Gives every module its own class back."""
        for slot in self._all_slots():
            for module in slot.modules:
                restore_class(module)
        for module in self._layers.values():
            restore_class(module)
        self._layers, self._slots = {}, {}

    def _all_slots(self) -> Iterator[Slot]:
        for slots in self._slots.values():
            yield from slots

    def _set_layer(self, i: int, layer: nn.Module, plan: LayerPlan | None) -> None:
        if plan is None:
            self._leave_out(layer)
            return
        if plan.positions is not None:
            device = self._slots[i][0].columns[0][0].weight.device
            layer.est_positions = indices(plan.positions, device)
        parts = zip(self._slots[i], plan.parts, self.shape.layers[i], strict=True)
        for slot, kept, part in parts:
            if kept.count == 0:
                for module, _ in slot.skippable:
                    self._leave_out(module)
            elif self.masked:
                _mask_slot(slot, kept, plan.scale)
            else:
                self._set_slot(slot, kept, plan.scale, part)

    def _leave_out(self, module: nn.Module) -> None:
        setattr(module, "est_masked" if self.masked else "est_skipped", True)

    @staticmethod
    def _set_slot(slot: Slot, kept: Kept, layer_scale: float, part: Part) -> None:
        if kept.units is None and layer_scale == 1.0:
            return
        device = slot.columns[0][0].weight.device
        units = indices(kept.units, device)
        for module, size in slot.columns:
            module.est_slice = Slice(units, size, kept.scale, layer_scale)
        if units is None:
            return
        for module, size in slot.rows + slot.norms:
            module.est_slice = Slice(units, size)
        for module, size in slot.inner_columns:
            module.est_slice = Slice(units, size, kept.scale)
        for module, stretches in slot.mixed_rows + slot.held:
            module.est_slice = Slice(rows_of(units, stretches), 1)
        for module, _ in slot.informed:
            module.est_slice = Slice(units, 1)
        if isinstance(part, Attention):
            _set_groups(slot, kept, part, units)
            return
        for follower in slot.followers:
            follower.set(len(units), 0)

    def _clear(self) -> None:
        for layer in self._layers.values():
            forget(layer)
        for slot in self._all_slots():
            for module in slot.modules:
                forget(module)
            for follower in slot.followers:
                follower.restore()


def _mask_slot(slot: Slot, kept: Kept, layer_scale: float) -> None:
    if kept.units is None and layer_scale == 1.0:
        return
    for module, size in slot.columns:
        values = mask_of(kept.units, kept.total, size, like=module.weight)
        module.est_mask = Mask(values, kept.scale, layer_scale)
    for module, size in slot.inner_columns + slot.norms:
        values = mask_of(kept.units, kept.total, size, like=module.weight)
        module.est_mask = Mask(values, kept.scale, 1.0)


def _set_groups(slot: Slot, kept: Kept, part: Attention, units: Tensor) -> None:
    """What an attention's key/value heads are, and whatever follows the counts."""
    groups = indices(kept.key_value_groups, units.device)
    num_groups = part.key_value_groups if groups is None else len(groups)
    assert len(units) % num_groups == 0, (
        f"{len(units)} kept heads share {num_groups} key/value heads unevenly; without "
        f"grouped-query attention a head is dropped with its key and value (Kept.key_value_groups)"
    )
    if groups is not None:
        for module, size in slot.group_rows:
            module.est_slice = Slice(groups, size)
    for module, size in slot.qkv_rows:
        module.est_slice = Slice(fused(units, groups, part.heads, part.key_value_groups), size)
    for follower in slot.followers:
        follower.set(len(units), num_groups)
