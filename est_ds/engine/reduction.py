"""What ZeRO 1 and 2 do with gradients between backward and AdamW, in fewer passes over memory.

Under ZeRO 1 gradients are reduced straight into the flat tensor that AdamW reads. DeepSpeed copies
each into a bucket, the bucket into another that is reduced, that one back, from there what this
replica steps into a third, and that into the flat tensor. Here every gradient is copied once: with
one replica to its place; else into a bucket, in the same order and as large as DeepSpeed's, and
from there what this replica steps to its place.

Of a parameter of which the step's plan reads some units, the bucket holds these alone: replicas do
not send each other the zeros of the others. The sums of two replicas have DeepSpeed's digits. Those
of more have them where the bucket's content is the same: a ring adds in an order that goes by the
place in the bucket.

In fp32 AdamW steps the weights that the model computes with, and not a copy of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from est_ds.config.deepspeed_keys import reduces_flat, steps_in_place
from est_ds.config.run_config import RunConfig
from est_ds.slicing.leaf import KeptUnits

ROW = 256  # elements whose squares are added in float32
KeptOf = Mapping[nn.Parameter, KeptUnits]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a parameter's gradient goes.

    Attributes:
        group: index of AdamW's group.
        start: first element of the flattened parameter that this replica steps.
        offset: of it in the group's flat tensor.
        length: elements that this replica steps; 0: none.
    """

    parameter: nn.Parameter
    group: int
    start: int = 0
    offset: int = 0
    length: int = 0


@dataclass(frozen=True, eq=False)
class Sent:
    """What replicas send each other of a parameter's gradient.

    Attributes:
        kept: the units that the step reads; None: all.
    """

    place: Place
    kept: KeptUnits | None

    @property
    def shape(self) -> Sequence[int]:
        whole = self.place.parameter
        return whole.shape if self.kept is None else self.kept.shape(whole)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Flats:
    """The gradients of what this replica steps, a flat tensor for each of AdamW's groups, made when
    the first is written."""

    def __init__(self, optimizer: Any, places: Sequence[Place]) -> None:
        self._like, self._places = optimizer.single_partition_of_fp32_groups, places
        self._flats: dict[int, Tensor] = {}
        self._written: set[Place] = set()

    def write(self, place: Place, gradient: Tensor) -> None:
        """Writes what this replica steps of a parameter's gradient."""
        if place.length:
            part = gradient.reshape(-1).narrow(0, place.start, place.length)
            self._own(place).copy_(part)
            self._written.add(place)

    def write_sent(self, sent: Sent, units: Tensor) -> None:
        """The same from what replicas sent; all else is zero."""
        place = sent.place
        if sent.kept is None or not place.length:
            self.write(place, units)
        elif place.length == place.parameter.numel():
            sent.kept.put(units, self._own(place).zero_().view_as(place.parameter))
            self._written.add(place)
        else:
            whole = torch.zeros_like(place.parameter, dtype=units.dtype)
            sent.kept.put(units, whole)
            self.write(place, whole)

    def finished(self) -> dict[int, list[Tensor]]:
        """The gradients of all groups as DeepSpeed takes them; zero where none was written."""
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        found = {}
        for i in range(len(self._like)):
            own = [place for place in self._places if place.group == i and place.length]
            for place in own:
                if place not in self._written:
                    self._own(place).zero_()
            parts = [self._own(place) for place in own]
            found[i] = GradPartitionBufferGroup(parts, self._flat(i))
        return found

    def _own(self, place: Place) -> Tensor:
        return self._flat(place.group).narrow(0, place.offset, place.length)

    def _flat(self, group: int) -> Tensor:
        if group not in self._flats:
            like = self._like[group]
            covered = sum(place.length for place in self._places if place.group == group)
            # What no parameter covers is padding, which must be zero.
            make = torch.empty_like if covered == like.numel() else torch.zeros_like
            self._flats[group] = make(like, requires_grad=False)
        return self._flats[group]


class Bucket:
    """Gradients that are reduced together.

    Attributes:
        elements: that are sent.
    """

    def __init__(self) -> None:
        self._sent: list[Sent] = []
        self._gradients: list[Tensor] = []
        self.elements = 0

    def add(self, sent: Sent, gradient: Tensor) -> None:
        self._sent.append(sent)
        self._gradients.append(gradient)
        self.elements += sent.elements

    def join(self) -> Tensor:
        """Returns what is sent, [elements], and forgets the gradients."""
        joined = self._gradients[0].new_empty(self.elements)
        for sent, gradient, out in zip(self._sent, self._gradients, self._split(joined)):
            if sent.kept is None:
                out.copy_(gradient)
            else:
                sent.kept.take(gradient, out)
        self._gradients.clear()
        return joined

    def write(self, joined: Tensor, flats: Flats) -> None:
        """Hands what `join` returned, reduced, to `flats`."""
        for sent, units in zip(self._sent, self._split(joined)):
            flats.write_sent(sent, units)

    def _split(self, joined: Tensor) -> list[Tensor]:
        parts = joined.split([sent.elements for sent in self._sent])
        return [part.view(sent.shape) for part, sent in zip(parts, self._sent)]


class FlatReduction:
    """Takes the place of `reduce_gradients` of DeepSpeed's optimizer of ZeRO 1.

    Args:
        optimizer: DeepSpeed's, without `contiguous_gradients`.
        kept_units: of the parameters of which the step reads some alone, on every replica the same.
    """

    def __init__(self, optimizer: Any, kept_units: Callable[[], KeptOf]) -> None:
        self._optimizer, self._kept_units = optimizer, kept_units
        self._places = [
            _place(parameter, i)
            for i, group in enumerate(optimizer.bit16_groups)
            for parameter in group
        ]

    def __call__(self, pipeline_parallel: bool = False) -> None:
        """Leaves the mean gradients of all replicas where the optimizer's step looks for them, and
        no others. A parameter without a gradient has one of zero."""
        import deepspeed.comm as comm

        optimizer, bucket = self._optimizer, Bucket()
        flats = Flats(optimizer, self._places)
        alone = comm.get_world_size(group=optimizer.dp_process_group) == 1
        kept = {} if alone else self._kept_units()
        for place in self._places:
            gradient = optimizer.get_gradient_for_reduction(place.parameter)
            optimizer.clear_grad_attribute(place.parameter)
            place.parameter.grad = None
            if gradient is None:
                continue
            if alone:
                flats.write(place, gradient)
                continue
            sent = Sent(place, kept.get(place.parameter))
            if bucket.elements and bucket.elements + sent.elements > optimizer.reduce_bucket_size:
                self._reduce(bucket, flats)
                bucket = Bucket()
            bucket.add(sent, gradient)
        if bucket.elements:
            self._reduce(bucket, flats)
        optimizer.averaged_gradients.update(flats.finished())

    def _reduce(self, bucket: Bucket, flats: Flats) -> None:
        import deepspeed.comm as comm

        group = self._optimizer.dp_process_group
        mean = bucket.join().div_(comm.get_world_size(group=group))
        comm.all_reduce(mean, group=group)
        bucket.write(mean, flats)


def pass_once(engine: Any, config: RunConfig, kept_units: Callable[[], KeptOf]) -> None:
    """Gives DeepSpeed's optimizer of ZeRO 1 and 2 what this file has, as far as the run allows.

    Args:
        kept_units: as of `FlatReduction`.
    """
    optimizer = engine.optimizer
    if config.parallel.zero not in (1, 2) or config.parallel.offload:
        return
    # A norm that is not finite says the same.
    optimizer.check_overflow = lambda partition_gradients=True: None
    optimizer.get_grad_norm_direct = partial(_norm, optimizer)
    if steps_in_place(config):
        _step_in_place(optimizer)
    if reduces_flat(config):
        optimizer.reduce_gradients = FlatReduction(optimizer, kept_units)


def sum_of_squares(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Returns the sum of the squares of all elements, a float64 scalar.

    In float32 over rows and in float64 over their sums: in float32 alone a CPU is 0.5 % off for
    TinyLlama's embedding, and in float64 alone it takes three times as long.
    """
    parts = [torch.zeros((), dtype=torch.float64, device=device)]
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        whole = len(flat) // ROW * ROW
        rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=torch.float32)
        parts += [some @ some for some in (rows.double(), flat[whole:].double())]
    return torch.stack(parts).sum()


def _norm(
    optimizer: Any, gradients: Iterable[Tensor], parameters: Iterable[Any], norm_type: float = 2
) -> Tensor:
    """The norm of gradients over all replicas and pipe stages; -1 if it is not finite."""
    import deepspeed.comm as comm

    assert norm_type == 2
    real = (g for g in gradients if not getattr(g, "_zero_padding", False))
    counted = [g for g, p in zip(real, parameters) if not getattr(p, "ds_pipe_replicated", False)]
    total = sum_of_squares(counted, optimizer.device).float()
    comm.all_reduce(total, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=total, op=comm.ReduceOp.SUM)
    return torch.where(total.isfinite(), total.sqrt(), -1.0)


def _step_in_place(optimizer: Any) -> None:
    for flat, shares, group in zip(
        optimizer.single_partition_of_fp32_groups,
        optimizer.parallel_partitioned_bit16_groups,
        optimizer.real_dp_process_group,
    ):
        flat.data = shares[dist.get_rank(group)]
    for parameter in (p for group in optimizer.bit16_groups for p in group):
        if (mapping := parameter._hp_mapping) is not None:
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            here = mapping.hp_fragment_address
            mapping.hp_fragment = flat.detach().narrow(0, here.start, here.numel)


def _place(parameter: nn.Parameter, group: int) -> Place:
    if (mapping := parameter._hp_mapping) is None:
        return Place(parameter, group)
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Place(parameter, group, there.start, here.start, here.numel)
