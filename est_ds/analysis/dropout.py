"""What a draw of a method, or of dropout, does to the gradient and the loss of the full model.

At given weights and on given batches of training: the gradient of a step's subnetwork, or under
dropout, is a random vector whose mean should be the full model's gradient and whose variance is
noise that training adds; the mean loss of the subnetworks less the full model's is what dropout's
theory calls a regularisation term. Everything drawn is what training draws at these steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from est_ds.analysis.hessian import mean_and_error
from est_ds.analysis.moments import moments_of, statistics
from est_ds.checkpoints.weights import with_weights
from est_ds.data.loader import Inputs
from est_ds.data.objectives.loss import Labels
from est_ds.design import Design
from est_ds.errors import UserError
from est_ds.plans.phases import Phase
from est_ds.plans.plan import Kept, LayerPlan, Plan, StepPlans, full_plan
from est_ds.slicing.dropout import address_dropout
from est_ds.slicing.subnetwork import Subnetwork

MicroBatch = tuple[Inputs, Labels]
LEAST_DRAWS = 8  # the standard error of fewer says little


@dataclass(frozen=True)
class Effort:
    """How much is spent.

    Attributes:
        draws: of every phase, each of another step.
        batches: global batches on which all of them are made.
    """

    draws: int = 32
    batches: int = 2

    def check(self) -> None:
        """Raises UserError if a value is not allowed."""
        if self.draws < LEAST_DRAWS:
            raise UserError(
                f"--draws={self.draws} is not allowed: the standard errors need at least "
                f"{LEAST_DRAWS}; leave it out for {Effort.draws}."
            )


@dataclass(frozen=True)
class Drawn:
    """A phase in which something is drawn.

    Attributes:
        steps: those whose draws are taken, evenly over the phase.
    """

    phase: Phase
    steps: tuple[int, ...]


def drawn_phases(design: Design, draws: int, name: str) -> list[Drawn]:
    """Returns the phases of a design that draw something of a model that is whole.

    Args:
        name: of the design, for errors.

    Raises:
        UserError: a phase has fewer steps than draws are wanted.
    """
    found = []
    for phase in design.method.phases:
        length = phase.until_step - phase.from_step
        count = min(draws, length)
        steps = tuple(phase.from_step + (2 * k + 1) * length // (2 * count) for k in range(count))
        plans = (plan for step in steps for plan in design.plans(step))
        if design.method.whole(phase.from_step) is not None:
            continue
        if not design.dropout and all(plan.is_full for plan in plans):
            continue
        if count < draws:
            raise UserError(
                f"--draws={draws} is not allowed: phase {phase.name!r} of {name} has {length} "
                f"steps, and each draws once; use {LEAST_DRAWS} to {length}."
            )
        found.append(Drawn(phase, steps))
    return found


class Draws:
    """The model of a design at given weights, as training runs it: sliced or masked, and dropping.

    Args:
        weights: by their Hugging Face names.
    """

    def __init__(self, design: Design, weights: dict[str, Tensor]) -> None:
        self._design = design
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = with_weights(design.hf_config, weights).to(self._device)
        family, method = design.family, design.method
        layers = dict(enumerate(family.layers(self.model)))
        self._subnetwork = Subnetwork(family, method.shape, layers, masked=method.masked)
        if design.dropout:
            seed = design.config.seed_of("method")
            address_dropout(self.model, family, seed, self._subnetwork)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]

    def full(self, batch: list[MicroBatch]) -> tuple[float, Tensor]:
        """Loss and gradient [P] of the full model without dropout, means over the micro-batches."""
        self.model.eval()
        parts = [tuple(part.units for part in layer) for layer in self._design.method.shape.layers]
        with self._subnetwork.active(full_plan(0, 0, parts)):
            return self._mean(batch)

    def drawn(self, plans: StepPlans, batch: list[MicroBatch]) -> tuple[float, Tensor]:
        """The same of what a step draws."""
        self.model.train()
        with self._subnetwork.active(plans):
            return self._mean(batch)

    @torch.no_grad()
    def drawn_loss(self, plans: StepPlans, batch: list[MicroBatch]) -> float:
        """The loss of what a step draws, without its gradient."""
        self.model.train()
        with self._subnetwork.active(plans):
            return sum(loss.item() for loss in self._losses(batch))

    def _mean(self, batch: list[MicroBatch]) -> tuple[float, Tensor]:
        total, whole = 0.0, [torch.zeros_like(p) for p in self._parameters]
        for loss in self._losses(batch):
            # A parameter outside of the subnetwork has None.
            for sum_, part in zip(whole, grad(loss, self._parameters, allow_unused=True)):
                if part is not None:
                    sum_ += part
            total += loss.item()
        return total, torch.cat([part.flatten() for part in whole])

    def _losses(self, batch: list[MicroBatch]) -> Iterator[Tensor]:
        """Every micro-batch's part of the mean loss, in its turn."""
        for i, (inputs, labels) in enumerate(batch):
            self._subnetwork.turn_to(i)
            ids = inputs if isinstance(inputs, tuple) else (inputs,)
            named = self._design.family.named_inputs(self._moved(ids))
            logits = self.model(**named, use_cache=False).logits
            labels = self._moved(labels) if isinstance(labels, tuple) else self._moved((labels,))[0]
            yield self._design.objective.loss(logits, labels) / len(batch)

    def _moved(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part.to(self._device) for part in parts)


def measure_draws(
    design: Design,
    weights: dict[str, Tensor],
    batches: list[list[MicroBatch]],
    phases: list[Drawn],
) -> list[dict[str, Any]]:
    """Returns what the draws of every phase do, as it stands in the file of numbers.

    Args:
        batches: micro-batches of `batch.micro`, by global batch.
    """
    draws = Draws(design, weights)
    full = [draws.full(batch) for batch in batches]
    return [_phase(draws, design, full, batches, drawn) for drawn in phases]


def _phase(
    draws: Draws,
    design: Design,
    full: list[tuple[float, Tensor]],
    batches: list[list[MicroBatch]],
    drawn: Drawn,
) -> dict[str, Any]:
    plans = [design.plans(step) for step in drawn.steps]
    # [draws], means over the batches.
    excess, bare = torch.zeros(2, len(plans), dtype=torch.float64)
    scales = any(_scales(plan) for of_step in plans for plan in of_step)
    moments = []
    for (full_loss, gradient), batch in zip(full, batches):

        def gradients() -> Iterator[Tensor]:
            for k, of_step in enumerate(plans):
                loss, found = draws.drawn(of_step, batch)
                excess[k] += (loss - full_loss) / len(batches)
                if scales:
                    loss = draws.drawn_loss(without_scale(of_step), batch)
                    bare[k] += (loss - full_loss) / len(batches)
                yield found

        moments.append(moments_of(gradient, gradients()))
    found = statistics(moments)
    return {
        "phase": drawn.phase.name,
        "from_step": drawn.phase.from_step,
        "until_step": drawn.phase.until_step,
        "draw": design.method.settings.draw,
        "compute": design.method.settings.compute,
        "dropout": design.dropout,
        "micro_batches": len(batches[0]),
        "full_loss": sum(loss for loss, _ in full) / len(full),
        "regularisation": _estimate(excess),
        "regularisation_without_scale": _estimate(bare) if scales else None,
        "gradient": {"bias": found.bias, **asdict(found)},
    }


def _estimate(values: Tensor) -> dict[str, float]:
    return dict(zip(("value", "standard_error"), mean_and_error(values.numpy())))


class _Bare(Kept):
    """What is kept of a part, whose output is not rescaled."""

    @property
    def scale(self) -> float:
        return 1.0


def _scales(plan: Plan) -> bool:
    """Whether a plan multiplies what it keeps."""
    kept = [layer for layer in plan.layers if layer is not None]
    parts = [part for layer in kept for part in layer.parts if part.count]
    return any(layer.scale != 1.0 for layer in kept) or any(part.scale != 1.0 for part in parts)


def without_scale(plans: StepPlans) -> StepPlans:
    """The same subnetworks, whose outputs are not rescaled."""
    return StepPlans(plans.step, len(plans), lambda i: _bare(plans[i]))


def _bare(plan: Plan) -> Plan:
    def bare(layer: LayerPlan) -> LayerPlan:
        parts = (_Bare(part.units, part.total, part.key_value_groups) for part in layer.parts)
        return LayerPlan(tuple(parts), positions=layer.positions)

    return replace(plan, layers=tuple(layer and bare(layer) for layer in plan.layers))


def spread_of_batches(full: list[Tensor]) -> float | None:
    """Variance of the full model's gradient over batches [P], over its mean square; None of one."""
    if len(full) < 2:
        return None
    squares = sum((gradient @ gradient).item() for gradient in full)
    total = torch.stack(full).sum(0)
    variance = (squares - (total @ total).item() / len(full)) / (len(full) - 1)
    return variance / (squares / len(full))
