"""Parameters that several pipe stages hold a copy of, as of an output head tied to the embedding.

Each copy needs the sum of the gradients of all, or they are no longer one parameter. DeepSpeed
sums `weight.grad`, where nothing is if its ZeRO optimizer accumulates in another precision than the
model's, and then averages over the replicas, in another order in every pipe stage. Here one
reduction over all copies of all replicas gives all the same sum; the first replica keeps it, and
the others add zero to the average that follows, which is exact in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed.comm as comm
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from torch import Tensor, nn

from est_ds.engine.fragments import Fragments
from est_ds.engine.patches import replace_instructions
from est_ds.errors import Failure

# Of a copy's norm; beyond rounding, which is there: torch's AdamW for CPUs rounds the last elements
# of a flat tensor otherwise than the rest, and they are others in every pipe stage.
MAY_DIFFER = 1e-4
AT_ONCE = 1 << 22  # elements that are summed up at a time


@dataclass(frozen=True)
class Tie:
    """One parameter that several pipe stages hold.

    Attributes:
        name: of the parameter, as in the Hugging Face model.
        stages: the pipe stages that hold a copy.
        group: the processes of these stages, of all replicas.
        parameter: the copy of this process, if it holds one.
    """

    name: str
    stages: tuple[int, ...]
    group: Any
    parameter: nn.Parameter | None


class Ties:
    """All tied parameters of a pipeline; every process has them, and calls all methods.

    Args:
        holders: by name of the parameter the pipe stages that hold it.
        grid: DeepSpeed's places of pipe stages and replicas.
        own: the parameters of this pipe stage by their Hugging Face names.
    """

    def __init__(
        self, holders: dict[str, set[int]], grid: Any, own: dict[str, nn.Parameter]
    ) -> None:
        self._stage, self._num_stages = grid.get_stage_id(), grid.pipe_parallel_size
        self._is_first_replica = grid.get_data_parallel_rank() == 0
        self._ties: list[Tie] = []
        for name, found in sorted(holders.items()):
            stages = tuple(sorted(found))
            if len(stages) == 1:
                continue  # one parameter held twice: autograd sums its gradients
            ranks = [
                grid.stage_to_global(stage, data=replica)
                for stage in stages
                for replica in range(grid.data_parallel_size)
            ]
            group = dist.new_group(ranks)
            parameter = own[name] if self._stage in stages else None
            if parameter is not None:
                # DeepSpeed then counts it once in the norm of the gradients.
                parameter.ds_pipe_replicated = self._stage != stages[0]
                dist.broadcast(parameter.data, ranks[0], group=group)  # hosts may draw otherwise
            self._ties.append(Tie(name, stages, group, parameter))

    def take_over(self, engine: Any) -> None:
        """Puts `sum_gradients` in the place of DeepSpeed's own summing.

        Args:
            engine: DeepSpeed's pipeline engine.
        """
        replace_instructions(engine, {ReduceTiedGrads: self.sum_gradients})

    def sum_gradients(self, engine: Any) -> None:
        """Gives the copies of the first replica the sum of all gradients, the others zero."""
        for tie in self._ties:
            if tie.parameter is None:
                continue
            gradient = (
                engine.optimizer.get_param_gradient_attribute(tie.parameter)
                if engine.zero_optimization_stage()
                else tie.parameter.grad
            )
            assert gradient is not None, f"{tie.name} has no gradient in stage {self._stage}"
            comm.all_reduce(gradient, group=tie.group)
            if not self._is_first_replica:
                gradient.zero_()

    def check(self, fragments: Fragments, step: int) -> None:
        """Compares the copies of every tied parameter, its fp32 weight and what AdamW
        keeps of it.

        Args:
            step: steps done; for the message.

        Raises:
            Failure: two copies differ by more than rounding; all processes raise it.
        """
        if not self._ties:
            return
        held = {tie.name: i for i, tie in enumerate(self._ties) if tie.parameter is not None}
        compared = ("weight as computed with", *fragments.keys)
        shape = (len(self._ties), self._num_stages, len(compared), 3)
        sums = torch.zeros(shape, dtype=torch.float64, device=fragments.device)
        own = sums[:, self._stage]
        if self._is_first_replica:
            for i in held.values():
                own[i, 0] = _sums(self._ties[i].parameter.detach().flatten(), 0)
        for part in fragments.divided():
            if part.name in held:
                for column, key in enumerate(fragments.keys, start=1):
                    own[held[part.name], column] += _sums(part.states[key], part.start)
        dist.all_reduce(sums)
        for tie, of_stages in zip(self._ties, sums.cpu()):
            copies = of_stages[list(tie.stages)]
            apart = (copies[:, :, 1:] - copies[0, :, 1:]).norm(dim=-1).amax(dim=0)
            norms = copies[:, :, 0].amax(dim=0).sqrt()
            if (apart > MAY_DIFFER * norms).any():
                found = zip(compared, (apart / norms).tolist())
                what = ", ".join(f"{name} by {much:.1e}" for name, much in found)
                raise Failure(
                    f"after {step} steps the copies of {tie.name} in the pipe stages "
                    f"{list(tie.stages)} are not the same ({what} of its norm), and no checkpoint "
                    f"is written: this is a fault of est_ds, DeepSpeed or a device, not of the run "
                    f"file. Set parallel.pipe=1 and start the run again: it resumes from its last "
                    f"checkpoint."
                )


def _sums(values: Tensor, start: int) -> Tensor:
    """Sums [3] over elements from `start` on, by which copies are compared: of x ** 2, and of x
    times cosine and sine of its place. Those of a tensor's ranges add up to the tensor's, and the
    last two differ by about the norm of the difference of two tensors.

    Args:
        values: [n].
    """
    total = torch.zeros(3, dtype=torch.float64, device=values.device)
    for at in range(0, len(values), AT_ONCE):
        some = values[at : at + AT_ONCE].double()
        places = torch.arange(start + at, start + at + len(some), device=some.device).double()
        total += torch.stack([some @ some, some @ places.cos(), some @ places.sin()])
    return total
