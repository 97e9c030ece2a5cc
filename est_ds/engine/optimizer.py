"""What a step does to parameters outside its subnetwork; decided here, the same in every layout.

`optimizer.inactive: zero_grad` (default): they have a gradient of zero, and AdamW steps them like
all others: their moments decay, decoupled weight decay applies, and they drift on while a moment is
left. `freeze`: an element whose gradient is exactly zero rests, weight and moments, without decay;
the rows of tokens that a batch does not hold rest too. The bias correction goes by the steps of the
run in both.

DeepSpeed does neither by itself everywhere. Without ZeRO and with one replica its pipeline leaves
gradients unset, which AdamW skips; under ZeRO 3, and with the optimizer on the host, the last
gradient that a parameter had stays and is applied again at every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from est_ds.config.sections import Optimizer

if TYPE_CHECKING:  # it imports DeepSpeed, which must not happen before the processes start
    pass


class FreezingAdamW(torch.optim.AdamW):
    """AdamW that leaves elements without a gradient as they are (`freeze`)."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        resting = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    tensors = [parameter, *(state[k] for k in ("exp_avg", "exp_avg_sq") if state)]
                    where = parameter.grad == 0
                    resting.append((where, tensors, [t[where] for t in tensors]))
        super().step(closure)
        for where, tensors, before in resting:
            for tensor, values in zip(tensors, before):
                tensor[where] = values


def fill_missing_gradients(module: nn.Module) -> None:
    """Before the step of a pipeline without ZeRO."""
    for parameter in module.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def adamw(
    parameters: Iterable[nn.Parameter],
    settings: Optimizer,
    embeddings: Iterable[nn.Parameter] = (),
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with two groups: matrices decay, and the rest as `decay` says.

    Every pipe stage has both groups, even if one held nothing: DeepSpeed reduces norms group by
    group, and hangs where stages differ in their number.

    Args:
        embeddings: those among the parameters, and what is tied to them.
    """
    apart = {id(p) for p in embeddings} if settings.decay == "no_embeddings" else ()
    matrices, vectors = [], []
    for parameter in parameters:
        # ZeRO 3 has flattened what it has cut into shares.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decays = len(shape) >= 2 and id(parameter) not in apart
        (matrices if decays else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": settings.weight_decay * (settings.decay == "all")},
    ]
    kind = FreezingAdamW if settings.inactive == "freeze" else torch.optim.AdamW
    return kind(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
