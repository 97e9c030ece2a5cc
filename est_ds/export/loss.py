"""Proves that a reloaded folder has the held-out loss that the run reported.

The logits' proof starts from the weights that were saved: it cannot see that the engine computed
with others, as where the stages of a pipeline hold different copies of one parameter.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from est_ds.checkpoints.index import Index
from est_ds.config.run_config import RunConfig
from est_ds.config.strict import checked
from est_ds.data.loader import Portion, Windows
from est_ds.data.objectives.loss import IGNORED
from est_ds.design import Design
from est_ds.errors import Failure, UserError
from est_ds.run.metrics import read_metrics
from est_ds.run.windows import WindowLosses

# Relative. Other kernels (a GPU's against this machine's) and micro-batches round otherwise.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
_SAID_AFTER_S = 60.0


def check_loss(
    reloaded: nn.Module, design: Design, index: Index, windows: dict[str, Windows]
) -> str:
    """Computes the held-out loss of a checkpoint again, by plain transformers from the folder.

    Args:
        reloaded: the whole model, from the folder; back on the CPU after the call.
        index: of the checkpoint.
        windows: of the held-out corpora, by name.

    Returns:
        A line that says both losses, or why there is nothing to compare.

    Raises:
        Failure: they differ beyond the tolerance.
    """
    reported = _reported(index, Path(design.config.run_dir))
    if reported is None:
        return f"held-out loss: not compared, since the run did not evaluate at step {index.step}"
    try:
        then = checked(RunConfig, index.state.config)
    except UserError as e:
        return f"held-out loss: not compared, since the checkpoint's config cannot be read: {e}"
    fingerprints = {name: held.corpus.fingerprint for name, held in windows.items()}
    if index.state.held_out != fingerprints:
        return "held-out loss: not compared, since the held-out corpora (data.valid) are others now"
    found = _mean_of_corpora(reloaded, design, windows, then.evaluate.sequences)
    tolerance = TOLERANCE[design.config.precision]
    if not abs(found - reported) <= tolerance * abs(reported):
        raise Failure(
            f"the run reported the held-out loss {reported:.6g} at step {index.step}, and the "
            f"exported weights have {found:.6g} in plain transformers (allowed: {tolerance:g} of "
            f"it): they are not what the run computed with. Nothing was exported; try another "
            f"--checkpoint, and report this with the run's config.yaml."
        )
    return (
        f"held-out loss: {found:.6g} in plain transformers, {reported:.6g} reported by the run "
        f"(allowed difference: {tolerance:g} of it)"
    )


def _reported(index: Index, run_dir: Path) -> float | None:
    """The checkpoint's, or of an evaluation that a notice cut short the one made on resuming."""
    if index.eval_loss is not None:
        return index.eval_loss
    _, evaluations = read_metrics(run_dir)
    at = [e["eval_loss"] for e in evaluations if e["step"] == index.step - 1]
    return at[-1] if at else None


def _mean_of_corpora(
    model: nn.Module, design: Design, windows: dict[str, Windows], count: int
) -> float:
    def losses() -> list[float]:
        each = (window_losses(model, design, held, count) for held in windows.values())
        return [found.mean for found in each]

    of_corpora = where_there_is_room(model, losses)
    return sum(of_corpora) / len(of_corpora)


Found = TypeVar("Found")


def where_there_is_room(model: nn.Module, compute: Callable[[], Found]) -> Found:
    """Returns what is computed with the model on a GPU, if there is one with room for that; the
    model is back on the CPU after the call."""
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        try:
            model.to(device)
            return compute()
        except torch.OutOfMemoryError:
            if device == "cpu":
                raise
        finally:
            model.to("cpu")
    raise AssertionError("the last device returns or raises")


@torch.no_grad()
def window_losses(model: nn.Module, design: Design, windows: Windows, count: int) -> WindowLosses:
    """Returns the losses of the held-out samples of a corpus, by plain transformers.

    Args:
        count: of samples; those that the run evaluates.
    """
    micro, batches = design.config.batch.micro, -(-count // design.config.batch.micro)
    began, losses, targets = time.monotonic(), [], []
    for i, batch in enumerate(windows.held_out(count, Portion(0, 1, micro=micro))):
        inputs, labels = (part if isinstance(part, tuple) else (part,) for part in batch)
        named = design.family.named_inputs(tuple(ids.to(model.device) for ids in inputs))
        logits_BTV = model(**named, use_cache=False).logits.cpu().float()
        summed_B = _summed(logits_BTV, labels[0])
        targets_B = (labels[0] != IGNORED).sum(1)
        losses += (summed_B / targets_B.clamp(min=1)).tolist()
        targets += targets_B.tolist()
        expected_s = (time.monotonic() - began) * batches
        if i == 0 and expected_s > _SAID_AFTER_S:
            print(
                f"computing the held-out loss of {windows.corpus.prefix} in plain transformers: "
                f"about {expected_s / 60:.0f} minutes",
                file=sys.stderr,
                flush=True,
            )
    numbers = np.array(windows.held_out_samples(count))
    return WindowLosses(np.array(losses)[:count], np.array(targets)[:count], numbers)


def _summed(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy of the targets of every row, nats, float64 [B]."""
    flat = logits_BTV.flatten(0, 1), labels_BT.flatten()
    losses = cross_entropy(*flat, ignore_index=IGNORED, reduction="none")
    return losses.double().view(labels_BT.shape).sum(1)
