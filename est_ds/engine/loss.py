"""The objective's loss, and on demand that of every row of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from est_ds.data.objectives.base import Settings
from est_ds.data.objectives.loss import IGNORED, Labels, divisor_of, mean_loss, targets_of
from est_ds.engine.head import LossHead, loss_head

Loss = Callable[[Tensor, Labels], Tensor]


class RowLosses:
    """Losses and targets of rows, in the order in which their micro-batches came.

    Attributes:
        losses: means over the rows' targets, nats per token; 0 of a row without one.
        targets: labels of every row that count.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.targets: list[int] = []


class RowLoss:
    """A loss that notes what each row contributes, within `noted`; costs nothing outside.

    Args:
        loss: the objective's.
        head: that of the model whose losses these are; None: the model gives logits.
        micro_batches: of a replica in a step, over whose losses the mean is trained.
    """

    def __init__(self, loss: Loss, head: LossHead | None = None, micro_batches: int = 1) -> None:
        self._loss, self._head, self._micro_batches = loss, head, micro_batches
        self._rows: RowLosses | None = None

    @classmethod
    def of(cls, objective: Settings, model: nn.Module, micro_batches: int) -> RowLoss:
        """Has the model's head compute the loss without the logits, unless the objective has a loss
        of its own, which reads them."""
        head = loss_head(model) if objective.loss is Settings.loss else None
        return cls(objective.loss, head, micro_batches)

    def expect(self, labels: Labels) -> None:
        """Says the labels of the forward that comes next."""
        if self._head is not None:
            self._head.est_labels = targets_of(labels)
            self._head.est_scale = 1.0 / (divisor_of(labels) * self._micro_batches)

    def __call__(self, output: Tensor, labels: Labels) -> Tensor:
        """Returns the loss of a micro-batch.

        Args:
            output: of the model: logits [B, T, V], or what its head has made of `labels`.
        """
        if self._rows is not None:
            self._note(self._rows, output, labels)
        return self._loss(output, labels) if self._head is None else mean_loss(output, labels)

    @contextmanager
    def noted(self) -> Iterator[RowLosses]:
        """Notes the rows of the micro-batches whose loss this process computes within."""
        rows = self._rows = RowLosses()
        try:
            yield rows
        finally:
            self._rows = None

    def _note(self, rows: RowLosses, output: Tensor, labels: Labels) -> None:
        labels_BT = targets_of(labels)
        targets_B = (labels_BT != IGNORED).sum(1)
        divisors_B = targets_B.clamp(min=1).float()
        if self._head is None:
            each = zip(output.split(1), labels_BT.split(1), divisors_B)
            losses_B = torch.stack([self._loss(row, (own, number)) for row, own, number in each])
        else:
            losses_B = self._head.est_losses.sum(1) / divisors_B
        rows.losses += losses_B.tolist()
        rows.targets += targets_B.tolist()
