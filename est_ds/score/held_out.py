"""Held-out losses of an exported model, with standard errors over the windows."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from est_ds.config.run_config import RunConfig
from est_ds.config.strict import checked
from est_ds.errors import Failure, UserError
from est_ds.export.loss import where_there_is_room, window_losses
from est_ds.run.metrics import read_metrics
from est_ds.run.scores import CorpusLoss, Figure
from est_ds.run.windows import WindowLosses
from est_ds.score.source import Source

# Beyond that e to the loss is no number any more.
_MOST_NATS = 700.0


def held_out_losses(source: Source, model: nn.Module) -> dict[str, CorpusLoss]:
    """Returns the losses of the windows that the run evaluates, by the name of the corpus.

    Raises:
        Failure: a loss is no number.
    """
    count = source.config.evaluate.sequences

    def of_all() -> dict[str, WindowLosses]:
        named = source.windows.items()
        return {name: window_losses(model, source.design, held, count) for name, held in named}

    reported, found = _reported(source), where_there_is_room(model, of_all)
    return {name: _figures(source, name, reported.get(name), f) for name, f in found.items()}


def mean_of(losses: dict[str, CorpusLoss]) -> Figure | None:
    """Returns the mean of the nats of several corpora, each of equal weight; None of one."""
    if len(losses) < 2:
        return None
    values = [loss.nats.value for loss in losses.values()]
    errors = [loss.nats.error for loss in losses.values()]
    error = None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(errors)
    return Figure(value=sum(values) / len(values), error=error)


def standard_error(found: WindowLosses) -> float | None:
    """Returns the standard error of the mean over all targets, as windows vary; None of one window.

    With the sum S_w of the losses of n_w targets, of W windows, and the mean L = sum S / sum n, it
    is sqrt(W / (W - 1) sum (S_w - L n_w)^2) / sum n: that of a ratio, and of equal windows their
    standard deviation over sqrt(W).
    """
    total, number = found.targets.sum(), len(found.targets)
    if number < 2 or not total:
        return None
    apart = (found.losses - found.mean) * found.targets
    return float(np.sqrt(number / (number - 1) * (apart**2).sum()) / total)


def _figures(source: Source, name: str, reported: float | None, found: WindowLosses) -> CorpusLoss:
    nats, error = found.mean, standard_error(found)
    if not nats < _MOST_NATS:
        raise Failure(
            f"the held-out loss of {source.windows[name].corpus.prefix} is {nats} nats a token at "
            f"step {source.step}: the model is broken; try another --checkpoint."
        )
    bits = source.windows[name].bits_per_byte(1.0)  # of one nat
    perplexity = math.exp(nats)

    def times(factor: float, value: float) -> Figure:
        return Figure(value=value, error=None if error is None else factor * error)

    return CorpusLoss(
        nats=times(1.0, nats),
        bits_per_byte=None if bits is None else times(bits, bits * nats),
        perplexity=times(perplexity, perplexity),
        windows=len(found.losses),
        targets=int(found.targets.sum()),
        reported=reported,
    )


def _reported(source: Source) -> dict[str, float]:
    """What the run itself said at this step of the same windows; nothing where it did not."""
    fingerprints = {name: held.corpus.fingerprint for name, held in source.windows.items()}
    try:
        then = checked(RunConfig, source.index.state.config).evaluate
    except UserError:
        return {}
    now = source.config.evaluate
    is_same = (then.sequences, then.choice) == (now.sequences, now.choice)
    if not is_same or source.index.state.held_out != fingerprints:
        return {}
    _, evaluations = read_metrics(source.run_dir)
    at = [e for e in evaluations if e["step"] == source.step - 1]
    if not at:
        return {}
    losses = at[-1].get("eval_losses") or dict.fromkeys(fingerprints, at[-1]["eval_loss"])
    return {name: loss for name, loss in losses.items() if loss is not None}
