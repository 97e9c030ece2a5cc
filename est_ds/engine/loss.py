"""The objective's loss, and on demand that of every row of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from est_ds.data.objectives.loss import IGNORED, Labels

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
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._rows: RowLosses | None = None

    def __call__(self, logits_BTV: Tensor, labels: Labels) -> Tensor:
        if self._rows is not None:
            self._note(self._rows, logits_BTV, labels)
        return self._loss(logits_BTV, labels)

    @contextmanager
    def noted(self) -> Iterator[RowLosses]:
        """Notes the rows of the micro-batches whose loss this process computes within."""
        rows = self._rows = RowLosses()
        try:
            yield rows
        finally:
            self._rows = None

    def _note(self, rows: RowLosses, logits_BTV: Tensor, labels: Labels) -> None:
        labels_BT = labels[0] if isinstance(labels, tuple) else labels
        targets_B = (labels_BT != IGNORED).sum(1)
        each = zip(logits_BTV.split(1), labels_BT.split(1), targets_B.clamp(min=1).float())
        losses = [self._loss(logits, (labels, targets)) for logits, labels, targets in each]
        rows.losses += torch.stack(losses).tolist()
        rows.targets += targets_B.tolist()
