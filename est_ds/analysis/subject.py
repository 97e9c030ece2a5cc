"""The full model of a run at a checkpoint, and its held-out windows, in one process.

The model is the library's own, in fp32 whatever the run computed in, without dropout. A checkpoint
belongs to no layout, and neither does what is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from est_ds.checkpoints.reader import damage
from est_ds.checkpoints.store import LATEST, Store
from est_ds.checkpoints.weights import whole_weights, with_weights
from est_ds.config.run_file import load_run
from est_ds.data.loader import Portion, Windows
from est_ds.data.objectives.loss import Labels
from est_ds.design import Design, make_design
from est_ds.errors import UserError
from est_ds.plans.plan import Plan
from est_ds.run.directory import check_run_dir
from est_ds.run.prepare import held_out_windows


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not what was written."""


@dataclass(frozen=True)
class Wanted:
    """What to measure on; a process that is given it can open it.

    Attributes:
        run: a run file or a run directory.
        checkpoint: `latest`, `best`, or a number of steps.
        windows: of every held-out corpus.
    """

    run: str
    overrides: tuple[str, ...] = ()
    checkpoint: str = LATEST
    windows: int = 16


@dataclass(frozen=True)
class Batch:
    """Some held-out windows.

    Attributes:
        named: the model's inputs.
        weight: share of the batch's loss in the mean: over the windows of a corpus, and over the
            corpora.
    """

    named: dict[str, Tensor]
    labels: Labels
    weight: float


@dataclass(frozen=True)
class Subject:
    """What is measured on.

    Attributes:
        step: steps that the weights were trained.
        model: on a GPU if there is one, in fp32.
        batches: the windows of all corpora; of each the same ones as in an evaluation of so many
            windows.
    """

    design: Design
    step: int
    model: nn.Module
    batches: tuple[Batch, ...]

    @property
    def directory(self) -> Path:
        return Path(self.design.config.run_dir)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def logits(self, batch: Batch) -> Tensor:
        """Returns the full model's logits, by kernels that can be differentiated twice."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(**batch.named, use_cache=False).logits

    def loss(self, batch: Batch) -> Tensor:
        """Returns a batch's part of the mean held-out loss, which is the sum over the batches."""
        return batch.weight * self.design.objective.loss(self.logits(batch), batch.labels)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Returns the mean held-out loss, nats per token."""
        return sum(self.loss(batch).item() for batch in self.batches)


def checkpoints_of(wanted: Wanted) -> tuple[Design, list[int]]:
    """Returns the design of a run, and the steps of its checkpoints of a full model.

    Raises:
        UserError: it has none, or the run file is wrong.
    """
    design = make_design(load_run(wanted.run, list(wanted.overrides)))
    store = Store.of(design.config.run_dir)
    newest = store.find(wanted.checkpoint)
    steps = [step for step in store.steps() if _grown(design, step) is None]
    if not steps:
        _check_grown(design, newest)
    return design, steps


def open_subject(wanted: Wanted, device: str | None = None) -> Subject:
    """Opens a checkpoint and the held-out windows.

    Args:
        device: where the model goes; a GPU, if there is one, if None.

    Raises:
        UserError: no such checkpoint, a damaged one, a model that still grows, or too few windows.
    """
    design, step = _found(wanted)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batches = tuple(_batches(design, wanted.windows, device))
    model = with_weights(design.hf_config, _weights(design, step)).eval().to(device)
    return Subject(design, step, model, batches)


def open_weights(wanted: Wanted) -> tuple[Design, int, dict[str, Tensor]]:
    """Opens a checkpoint alone.

    Returns:
        The design of its run, the steps that it was trained, and its weights in fp32 by their
        Hugging Face names.

    Raises:
        UserError: no such checkpoint, a damaged one, or a model that still grows.
    """
    design, step = _found(wanted)
    return design, step, _weights(design, step)


def _found(wanted: Wanted) -> tuple[Design, int]:
    design = make_design(load_run(wanted.run, list(wanted.overrides)))
    step = Store.of(design.config.run_dir).find(wanted.checkpoint)
    check_run_dir(design.config)
    _check_grown(design, step)
    return design, step


def _weights(design: Design, step: int) -> dict[str, Tensor]:
    store = Store.of(design.config.run_dir)
    checkpoint = store.path(step)
    with store.reading(step):
        if wrong := damage(checkpoint):
            raise DamagedCheckpoint(
                f"checkpoint {checkpoint} is damaged: {wrong}; choose another one."
            )
        return whole_weights(design, checkpoint, torch.float32)


def _grown(design: Design, step: int) -> Plan | None:
    """What there is of a model that still grows after so many steps; None: all of it."""
    return design.method.whole(max(0, step - 1))


def _check_grown(design: Design, step: int) -> None:
    grown = _grown(design, step)
    if grown is not None:
        raise UserError(
            f"checkpoint {step}: the model has grown to {len(grown.kept_layers)} of "
            f"{design.method.shape.num_layers} layers by then, and the full model is measured; "
            f"choose a later checkpoint (--step), or train on."
        )


def _batches(design: Design, count: int, device: str) -> Iterator[Batch]:
    held_out = held_out_windows(design)
    for windows in held_out.values():
        _check_count(windows, count)
        # No row is padding: every one is a window.
        micro = math.gcd(count, design.config.batch.micro)
        for inputs, labels in windows.held_out(count, Portion(0, 1, micro=micro)):
            ids = inputs if isinstance(inputs, tuple) else (inputs,)
            named = design.family.named_inputs(tuple(part.to(device) for part in ids))
            on_device = (
                tuple(part.to(device) for part in labels)
                if isinstance(labels, tuple)
                else labels.to(device)
            )
            yield Batch(named, on_device, micro / count / len(held_out))


def _check_count(windows: Windows, count: int) -> None:
    if not 1 <= count <= windows.num_samples:
        raise UserError(
            f"--windows={count} is not allowed: the held-out corpus {windows.corpus.prefix} has "
            f"{windows.num_samples} windows; use 1 to {windows.num_samples}."
        )
