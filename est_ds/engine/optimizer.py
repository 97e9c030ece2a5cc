"""What a step does to parameters outside its subnetwork, and to those that are new.

Decided here, the same in every layout.

`optimizer.inactive: zero_grad` (default): parameters outside the subnetwork have a gradient of
zero, and AdamW steps them like all others: their moments decay, decoupled weight decay applies, and
they drift on while a moment is left. `freeze`: an element whose gradient is exactly zero rests,
weight and moments, without decay; the rows of tokens that a batch does not hold rest too.

AdamW divides its moments by 1 - beta ** n, since they began at zero n steps ago. Where n is the
steps of the run though a moment began later, it is divided by too much: with a constant gradient
and betas .9 and .999 the weight moves by up to 6.6 learning rates a step, and by more than 2 for
287 steps. So a new layer counts the steps since it began, and with `freeze` every element counts
those in which it did not rest.

DeepSpeed does not fill in gradients by itself everywhere. Without ZeRO and with one replica its
pipeline leaves them unset, which AdamW skips; under ZeRO 3, and with the optimizer on the host, the
last gradient that a parameter had stays and is applied again at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_step

from est_ds.config.sections import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
COUNT = "active_steps"
AT_ONCE = 1 << 22  # elements that are computed at a time, where that takes memory
Piece = tuple[int, int, int]  # offset and length in a tensor, and the step after which it began


class GrowingAdamW(torch.optim.AdamW):
    """AdamW in which pieces of a tensor may have begun later than the rest.

    Attributes:
        pieces: of tensors that have such ones all pieces, padding aside; other tensors are of one
            age, that of the run. While there are none it is torch's AdamW.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.pieces: dict[Tensor, list[Piece]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if not self.pieces:
            return super().step(closure)
        for group in self.param_groups:
            found: list[list[Tensor]] = [[] for _ in range(5)]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    for of_piece in self._cut(parameter):
                        for column, tensor in zip(found, of_piece):
                            column.append(tensor)
            weights, gradients, means, squares, ages = found
            adamw_step(
                *(weights, gradients, means, squares, [], ages),
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                **{key: group[key] for key in ("lr", "weight_decay", "eps", "maximize")},
            )

    def _cut(self, parameter: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """Weight, gradient, moments, and the steps done since it began, of every piece."""
        state, whole = self.state[parameter], _flat(self, parameter)
        for offset, length, began in self.pieces.get(parameter, [(0, parameter.numel(), 0)]):
            yield (*(t.narrow(0, offset, length) for t in whole), state["step"] - began)
        state["step"] += 1  # last: torch counts the step of the pieces itself


class FreezingAdamW(torch.optim.AdamW):
    """AdamW that leaves elements without a gradient as they are (`freeze`); every element counts
    its own steps."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                started(self, parameter)["step"] += 1
                for some in zip(*(t.split(AT_ONCE) for t in _flat(self, parameter))):
                    _step_active(some, group)


def _step_active(some: tuple[Tensor, ...], group: dict[str, Any]) -> None:
    """Steps the elements that have a gradient; `some` as `_flat` has them."""
    weight, gradient, mean, square, count = some
    active = gradient != 0
    count += active
    beta1, beta2 = group["betas"]
    change = torch.where(active, gradient - mean, 0)
    mean.add_(change, alpha=1 - beta1)
    change = torch.where(active, gradient * gradient - square, 0)
    square.add_(change, alpha=1 - beta2)
    root = (square / _bias_left(beta2, count)).sqrt_().add_(group["eps"])
    move = mean / _bias_left(beta1, count) / root + group["weight_decay"] * weight
    weight.sub_(torch.where(active, move, 0), alpha=group["lr"])


def _bias_left(beta: float, steps: Tensor) -> Tensor:
    """1 - beta ** steps without cancellation; of one step where there was none."""
    log = math.log(beta) if beta else -math.inf
    return torch.expm1(steps.clamp(min=1) * log).neg_()


def _flat(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """Weight, gradient, and what AdamW keeps of them, all [n] and all but the gradient views."""
    state = optimizer.state[parameter]
    kept = [state[key].view(-1) for key in state_keys(optimizer)]
    return [parameter.detach().view(-1), parameter.grad.reshape(-1), *kept]


def state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What AdamW keeps of every element besides its weight."""
    return (*MOMENTS, COUNT) if isinstance(optimizer, FreezingAdamW) else MOMENTS


def started(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """The state of a tensor; AdamW makes it in its first step, and here it is made if need be."""
    state = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for key in state_keys(optimizer):
            state[key] = torch.zeros_like(tensor, requires_grad=False)
    return state


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
    kind = FreezingAdamW if settings.inactive == "freeze" else GrowingAdamW
    return kind(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
