"""Where this process keeps which part of a parameter's fp32 weight and moments.

ZeRO cuts parameters into flat ranges, each way in its own manner. A fragment is such a range under
the parameter's Hugging Face name; what is read and written through fragments (checkpoints, growing
layers) knows nothing of the layout. The places come from DeepSpeed's own tables: `_hp_mapping` of
ZeRO 1 and 2, which its universal checkpoints are built on, and `grad_position` of ZeRO 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from est_ds.engine.optimizer import GrowingAdamW, Piece, started, state_keys


@dataclass(frozen=True)
class Fragment:
    """A range of a flattened parameter, with its state.

    Attributes:
        name: of the parameter, as in the Hugging Face model.
        start: its first element in the flattened parameter.
        states: by their keys (`Fragments.keys`), flat fp32 views [length] of what DeepSpeed uses.
    """

    name: str
    start: int
    states: dict[str, Tensor]

    @property
    def stop(self) -> int:
        return self.start + self.states["weight"].numel()


class Fragments:
    """The fragments of the parameters that live in this process.

    Args:
        engine: a DeepSpeed engine: without ZeRO, or ZeRO 1 to 3; no BF16_Optimizer.
        parameters: the engine's parameters by their Hugging Face names.
        replica: this process's data-parallel rank.
        num_replicas: data-parallel size.
        is_first: which of these parameters this pipe stage answers for, where several hold one.

    Attributes:
        keys: weight, exp_avg, exp_avg_sq, and with `freeze` the count of an element's own steps.
        births: of parameters, by what their names begin with, AdamW's count of steps when their
            moments were zero; 0 of all others. Set by `commit`.
        shapes: of the parameters that live here, wholly or partly.
        device: the one that communicates.
    """

    def __init__(
        self,
        engine: Any,
        parameters: Mapping[str, nn.Parameter],
        replica: int,
        num_replicas: int,
        is_first: Mapping[str, bool] | None = None,
    ) -> None:
        self._engine, self._parameters = engine, dict(parameters)
        self._replica, self._num_replicas = replica, num_replicas
        self._is_first = is_first or {}
        self._zero = engine.zero_optimization_stage()
        self.device = engine.device
        self.keys = ("weight", *state_keys(self._inner))
        self.births: dict[str, int] = {}
        self.shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in parameters.items()}

    def held(self) -> Iterator[Fragment]:
        """All that lives here; without ZeRO every replica holds everything."""
        for name, parameter in self._parameters.items():
            place = self._place(parameter)
            if place is not None:
                flat, offset, start, length = place
                yield Fragment(
                    name,
                    start,
                    {k: t.narrow(0, offset, length) for k, t in self._states(flat).items()},
                )

    def owned(self) -> Iterator[Fragment]:
        """Each element of the model exactly once over all processes."""
        return (part for part in self.divided() if self._is_first.get(part.name, True))

    def divided(self) -> Iterator[Fragment]:
        """Each element of this pipe stage exactly once over its replicas."""
        for fragment in self.held():
            if self._zero == 0:
                total = fragment.stop
                start, stop = (total * (self._replica + i) // self._num_replicas for i in (0, 1))
                if start == stop:
                    continue
                states = {k: t[start:stop] for k, t in fragment.states.items()}
                fragment = Fragment(fragment.name, start, states)
            yield fragment

    @property
    def num_bytes(self) -> int:
        """What the owned fragments take."""
        return sum(4 * len(self.keys) * (f.stop - f.start) for f in self.owned())

    @property
    def optimizer_steps(self) -> int:
        """Steps that AdamW has done, by which it corrects the moments' bias."""
        for flat in self._flats():
            if state := self._inner.state.get(flat):
                return int(state["step"])
        return 0

    @torch.no_grad()
    def commit(self, optimizer_steps: int, births: Mapping[str, int]) -> None:
        """Brings the weights that the model computes with in line with what was written.

        Every process calls it.

        Args:
            optimizer_steps: see the property.
            births: see the attribute.
        """
        self.births = dict(births)
        for flat in self._flats():
            started(self._inner, flat)["step"].fill_(optimizer_steps)
        if isinstance(self._inner, GrowingAdamW):  # the other one counts every element's steps
            self._inner.pieces = self._pieces() if births else {}
        optimizer = self._engine.optimizer
        if self._zero in (1, 2):
            optimizer.update_lp_params()
        elif self._zero == 3:
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @torch.no_grad()
    def gather(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The whole state of one parameter, on every process; all call it.

        Args:
            shape: of the parameter, which need not live here.

        Returns:
            By their keys, fp32 [*shape], on the device that communicates.
        """
        whole = torch.zeros(len(self.keys), prod(shape), device=self.device)
        for fragment in self.owned():
            if fragment.name == name:
                for row, key in zip(whole, self.keys):
                    row[fragment.start : fragment.stop] = fragment.states[key]
        dist.all_reduce(whole)  # one process holds an element, the others zero
        return {key: row.view(shape) for key, row in zip(self.keys, whole)}

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The AdamW that DeepSpeed steps."""
        optimizer = self._engine.optimizer
        return optimizer if self._zero == 0 else optimizer.optimizer

    def _flats(self) -> list[Tensor]:
        """What the AdamW steps, of this process."""
        optimizer = self._engine.optimizer
        if self._zero == 0:
            return list(self._parameters.values())
        if self._zero == 3:
            return optimizer.fp32_partitioned_groups_flat
        return optimizer.single_partition_of_fp32_groups

    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
        """Flat tensor, offset in it, first element of the parameter, and length; None: nothing."""
        optimizer = self._engine.optimizer
        if self._zero == 0:
            return parameter, 0, 0, parameter.numel()
        if self._zero == 3:
            group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = self._replica * length
            # Partitions are equal: the last ones may be padding.
            length = min(length, parameter.ds_numel - start)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            return (flat, offset, start, length) if length > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        return flat, here.start, there.start, here.numel

    def _states(self, flat: Tensor) -> dict[str, Tensor]:
        """Weight of a flat tensor, and what AdamW keeps of it."""
        state = started(self._inner, flat)
        kept = {key: state[key].view(-1) for key in state_keys(self._inner)}
        return {"weight": flat.detach().view(-1), **kept}

    def _pieces(self) -> dict[Tensor, list[Piece]]:
        """Of every flat tensor the parameters' ranges, each with its birth."""
        pieces: dict[Tensor, list[Piece]] = {}
        for name, parameter in self._parameters.items():
            if place := self._place(parameter):
                flat, offset, _, length = place
                born = [step for path, step in self.births.items() if name.startswith(path)]
                pieces.setdefault(flat, []).append((offset, length, *(born or [0])))
        return pieces
