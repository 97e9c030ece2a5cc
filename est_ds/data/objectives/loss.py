"""The loss that an objective trains, if it does not bring one of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # `est-ds plan` reads objectives, and does without torch
    from torch import Tensor

IGNORED = -100  # label that the loss leaves out

# int64 [B, T]; or these and the divisor of the sum.
Labels: TypeAlias = "Tensor | tuple[Tensor, Tensor]"


def targets_of(labels: Labels) -> Tensor:
    """The labels alone, int64 [B, T]."""
    return labels[0] if isinstance(labels, tuple) else labels


def divisor_of(labels: Labels) -> int | Tensor:
    """What a sum of their losses is divided by: B * T, or the divisor given with the labels."""
    return labels[1] if isinstance(labels, tuple) else labels.numel()


def token_loss(logits_BTV: Tensor, labels: Labels) -> Tensor:
    """Returns the cross-entropy summed over the tokens that count, as a mean: see `mean_loss`."""
    from torch.nn.functional import cross_entropy

    summed = cross_entropy(
        logits_BTV.float().flatten(0, 1),
        targets_of(labels).flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return mean_loss(summed, labels)


def mean_loss(summed: Tensor, labels: Labels) -> Tensor:
    """Returns a sum of tokens' losses over their number: nats per token.

    The number is B * T, or the divisor given with the labels. It does not depend on the labels
    themselves, so that micro-batches may be averaged in any grouping (a padded batch counts for
    what it holds). An infinite loss, whose gradient may be finite, gets one that is no number: the
    norm of the gradients alone then tells every rank that the step must not be applied.
    """
    loss = summed / divisor_of(labels)
    return loss * (1.0 + 0.0 * loss.detach())
