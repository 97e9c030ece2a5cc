"""The summary of a run: tokens, loss, FLOPs and time saved. Reads files only, trains nothing."""

from __future__ import annotations

import math
import operator
import os
from dataclasses import dataclass
from statistics import median
from typing import Any

from est_ds.data.manifest import read_manifest
from est_ds.report.files import RunFiles, read_run


@dataclass(frozen=True)
class PhaseSummary:
    """One phase that has begun, and in which a step was trained.

    Attributes:
        from_step: its first step.
        until_step: the step after the last one trained so far.
        median_step_s: over the logged steps; step 0, which warms up, left out.
        tokens_per_s: at the median step time.
        time_ratio: median step time over that of the full model; None if that is not measured.
        blocks_ratio: FLOPs of its steps over the dense ones, `blocks`.
        model_ratio: the same, `model`.
        keeps_everything: its steps train the full model.
    """

    name: str
    from_step: int
    until_step: int
    median_step_s: float
    tokens_per_s: float
    time_ratio: float | None
    blocks_ratio: float
    model_ratio: float
    keeps_everything: bool

    @property
    def num_steps(self) -> int:
        return self.until_step - self.from_step


@dataclass(frozen=True)
class Summary:
    """A run so far.

    Attributes:
        tokens: trained by all replicas together.
        eval_loss: held-out loss of the full model at `eval_step`, nats per token; None before
            the first evaluation. Of several held-out corpora it is the mean.
        eval_losses: by the name of the corpus, where held-out corpora have names.
        valid_entropy: unigram entropy of the held-out corpus, nats per token: the loss of a model
            that knows how frequent every token is in it and nothing else. Of several corpora the
            mean, as of the losses. None without a manifest.
        train_entropy: that of the training corpus; None also of weights that change.
        saved_blocks: fraction of the dense `blocks` FLOPs of the steps done that was saved.
        saved_model: the same of the `model` FLOPs.
        full_step_s: median step time over the phases that keep everything; None if no such
            phase has begun.
        full_from: first step of the first phase that keeps everything; None if there is none.
        saved_time: fraction of the time saved against the same steps at `full_step_s` each,
            every phase at its median step time; evaluations and checkpoints do not count.
        efficiency: `saved_time / saved_model`; None if nothing was to be saved.
        skipped: steps that were left out, their loss or gradient being no number or a spike.
        spikes: steps whose loss was a spike, and that were trained.
    """

    run_dir: str
    method: str
    num_steps: int
    total_steps: int
    tokens: int
    train_loss: float
    eval_loss: float | None
    eval_step: int | None
    eval_losses: dict[str, float]
    valid_entropy: float | None
    train_entropy: float | None
    saved_blocks: float
    saved_model: float
    phases: tuple[PhaseSummary, ...]
    full_step_s: float | None
    full_from: int | None
    saved_time: float | None
    efficiency: float | None
    skipped: tuple[int, ...]
    spikes: tuple[int, ...]

    @property
    def time_s(self) -> float:
        """Training time, every phase at its median step time."""
        return sum(p.num_steps * p.median_step_s for p in self.phases)


def summarise(run_dir: str | os.PathLike) -> Summary:
    """The summary of a run directory, finished or not.

    Raises:
        UserError: it is no run directory, or its metrics are missing or incomplete.
    """
    return summary_of(read_run(run_dir))


def summary_of(run: RunFiles) -> Summary:
    """The summary of a run that is read already."""
    full = [i for i in range(len(run.method.phases)) if run.keeps_everything(i)]
    full_lines = [entry for i in full for entry in run.lines_of(i)]
    full_step_s = _median_step_s(full_lines) if full_lines else None
    skipped = tuple(e["step"] for e in run.events if "skipped" in e)
    done = max(run.steps[-1]["step"], *skipped, -1) + 1
    phases = tuple(
        _phase(run, i, done, full_step_s, i in full)
        for i, phase in enumerate(run.method.phases)
        if phase.from_step < done and run.lines_of(i)
    )
    counted = sum(p.num_steps for p in phases)
    saved_blocks = 1.0 - sum(p.num_steps * p.blocks_ratio for p in phases) / counted
    saved_model = 1.0 - sum(p.num_steps * p.model_ratio for p in phases) / counted
    saved_time = None
    if full_step_s:
        saved_time = 1.0 - sum(p.num_steps * p.median_step_s for p in phases) / counted / full_step_s
    saves = saved_time is not None and not math.isclose(saved_model, 0.0, abs_tol=1e-12)
    data = run.config.data
    last_evaluation = run.evaluations[-1] if run.evaluations else {}
    return Summary(
        run_dir=str(run.directory),
        method=run.config.method["name"],
        num_steps=done,
        total_steps=run.config.steps,
        tokens=(done - len(skipped)) * run.tokens_per_step,
        train_loss=run.steps[-1]["loss"],
        eval_loss=last_evaluation.get("eval_loss"),
        eval_step=last_evaluation.get("step"),
        eval_losses={
            name: math.nan if loss is None else loss
            for name, loss in last_evaluation.get("eval_losses", {}).items()
        },
        valid_entropy=_unigram_entropy({prefix: 1.0 for prefix in data.held_out.values()}),
        train_entropy=_unigram_entropy({part.corpus: part.weight for part in data.parts}),
        saved_blocks=saved_blocks,
        saved_model=saved_model,
        phases=phases,
        full_step_s=full_step_s,
        full_from=run.method.phases[full[0]].from_step if full else None,
        saved_time=saved_time,
        efficiency=saved_time / saved_model if saves else None,
        skipped=skipped,
        spikes=tuple(e["step"] for e in run.events if "spike" in e),
    )


def _phase(
    run: RunFiles, i: int, done: int, full_step_s: float | None, keeps_everything: bool
) -> PhaseSummary:
    phase, lines = run.method.phases[i], run.lines_of(i)
    step_s = _median_step_s(lines)
    def ratio(figure: str) -> float:
        return sum(e[f"{figure}_active"] for e in lines) / sum(e[f"{figure}_dense"] for e in lines)

    return PhaseSummary(
        name=phase.name,
        from_step=phase.from_step,
        until_step=min(done, phase.until_step),
        median_step_s=step_s,
        tokens_per_s=run.tokens_per_step / step_s,
        time_ratio=step_s / full_step_s if full_step_s else None,
        blocks_ratio=ratio("blocks"),
        model_ratio=ratio("flops"),
        keeps_everything=keeps_everything,
    )


def _median_step_s(lines: list[dict[str, Any]]) -> float:
    """Without step 0, which warms up; resumed steps do too, but only the median can tell."""
    warm = [e["step_s"] for e in lines if e["step"] > 0]
    return median(warm or [e["step_s"] for e in lines])


def _unigram_entropy(weights: dict[str, float | None]) -> float | None:
    """Mean over corpora by their manifests; None if one has none, stands elsewhere, or has no
    weight.

    Args:
        weights: by the prefix of the corpus.
    """
    manifests = [read_manifest(prefix) for prefix in weights]
    if None in manifests or None in weights.values():
        return None
    entropies = [manifest.unigram_entropy for manifest in manifests]
    return sum(map(operator.mul, entropies, weights.values())) / sum(weights.values())


def print_summary(run_dir: str | os.PathLike) -> None:
    """Prints the summary of a run directory: fits 80 columns, needs no colour.

    Raises:
        UserError: it is no run directory, or its metrics are missing or incomplete.
    """
    from est_ds.report.text import print_tables

    print_tables(summarise(run_dir))
