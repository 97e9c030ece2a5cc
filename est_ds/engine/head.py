"""The output head and the loss in one, so that a micro-batch's logits are never whole in memory.

Rows go through the head some at a time: their logits give their losses and, in the forward already,
their part of the gradients. What is kept is a gradient of what the head reads and one of its
weight, in place of the logits, their softmax and their gradient.

torch's own `linear_cross_entropy` does the same, but in bf16 it rounds the loss to bf16 and adds
the chunks' gradients of the weight in bf16, and it is slower than the logits on a CPU.

Shapes: B batch, T tokens, N = B * T, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from est_ds.cost.activations import FEWEST_ROWS, LOGITS_AT_ONCE, LOGITS_AT_ONCE_ON_GPU
from est_ds.data.objectives.loss import IGNORED
from est_ds.slicing.leaf import swap_class


class LossHead:
    """An output head that returns the sum of the tokens' losses, where it is given labels.

    Attributes:
        est_labels: of the next forward, int64 [B, T]; None: it returns logits.
        est_losses: of the last forward with labels, nats, fp32 [B, T]; 0 where there is no target.
    """

    est_labels: Tensor | None = None
    est_losses: Tensor | None = None

    def forward(self, x_BTH: Tensor) -> Tensor:
        labels_BT, self.est_labels = self.est_labels, None
        if labels_BT is None:
            return super().forward(x_BTH)
        x_NH, labels_N = x_BTH.flatten(0, 1), labels_BT.flatten()
        summed, losses_N = summed_loss(x_NH, self.weight, self.bias, labels_N)
        self.est_losses = losses_N.view_as(labels_BT)
        return summed


def loss_head(model: nn.Module) -> LossHead:
    """Makes the output head of a Hugging Face model a `LossHead`; names and weights stay."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear), f"{type(head).__name__} is no linear output head"
    swap_class(head, LossHead)
    return head


def summed_loss(
    x_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the cross-entropy of x @ weight.T + bias summed over the labels that are not ignored,
    and that of every token without gradients; in fp32, nats. It has one backward, no second."""
    given = x_NH, weight_VH, bias_V
    if not torch.is_grad_enabled():
        given = tuple(t if t is None else t.detach() for t in given)
    return _SummedLoss.apply(*given, labels_N)


class _SummedLoss(Function):
    """`summed_loss`. Gradients of ignored rows are left out where they are hidden wide rather than
    vocabulary wide."""

    @staticmethod
    def forward(ctx, x_NH, weight_VH, bias_V, labels_N):
        has_backward = any(ctx.needs_input_grad)
        counts_N1 = (labels_N != IGNORED)[:, None]
        at_N1 = labels_N.clamp(min=0)[:, None]
        losses_N1 = x_NH.new_empty(len(x_NH), 1, dtype=torch.float32)
        grad_x = torch.empty_like(x_NH) if has_backward else None
        grad_weight = grad_bias = None
        for some in _slices(len(x_NH), weight_VH):
            x, at, counts = x_NH[some], at_N1[some], counts_N1[some]
            log_p = linear(x, weight_VH, bias_V).float().log_softmax(-1)
            losses_N1[some] = torch.where(counts, -log_p.gather(1, at), 0.0)
            if not has_backward:
                continue
            grad = log_p.exp_().scatter_add_(1, at, -torch.ones_like(at, dtype=torch.float32))
            grad = grad.to(x.dtype)
            grad_x[some] = (grad @ weight_VH) * counts
            grad_weight = _plus_product(grad_weight, grad, x * counts)
            if bias_V is not None:
                grad_bias = _plus_product(grad_bias, grad, counts.to(x.dtype))
        losses_N = losses_N1[:, 0]
        ctx.mark_non_differentiable(losses_N)
        ctx.gradients = grad_x, grad_weight, grad_bias
        return losses_N.sum(), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        (grad_x, grad_weight, grad_bias), ctx.gradients = ctx.gradients, None
        if grad_bias is not None:
            grad_bias = grad_bias[:, 0].mul_(grad).to(grad_x.dtype)
        return grad_x.mul_(grad), grad_weight.mul_(grad).to(grad_x.dtype), grad_bias, None


def _plus_product(total: Tensor | None, grad_NV: Tensor, x_NH: Tensor) -> Tensor:
    """Adds grad.T @ x to a total [V, H], in fp32 where there are several; None is zero."""
    if total is None:
        return grad_NV.t() @ x_NH
    if x_NH.dtype == torch.float32:
        return total.addmm_(grad_NV.t(), x_NH)
    return total.float().add_(grad_NV.t() @ x_NH)


def _slices(num_rows: int, weight_VH: Tensor) -> Iterator[slice]:
    """Rows that go through the head together."""
    most = LOGITS_AT_ONCE if weight_VH.device.type == "cpu" else LOGITS_AT_ONCE_ON_GPU
    length = max(FEWEST_ROWS, most // len(weight_VH))
    return (slice(begin, begin + length) for begin in range(0, num_rows, length))
