"""The summary of a run: tokens, loss, FLOPs and time saved. Reads files only, trains nothing."""

from __future__ import annotations

import math
import operator
import os
from dataclasses import dataclass
from typing import Any

from est_ds.data.manifest import Manifest, known_manifest
from est_ds.report.files import RunFiles, read_run
from est_ds.report.times import Between, TimedLines, Timing, middle, timed
from est_ds.run.metrics import Steps, steps_of
from est_ds.run.parent import Parent, read_parent
from est_ds.run.step_times import StepTimes, Turns


@dataclass(frozen=True)
class PhaseSummary:
    """One phase that has begun, and in which a step was trained.

    Attributes:
        from_step: its first step.
        until_step: the step after the last one trained so far.
        timing: of its steps in the summary's layout, start-up left out; None if none is left.
        tokens_per_s: at the median step time.
        time_ratio: step time over that of the full model: the median of the rounds in which they
            were measured in turns, or median over median; None if one is not measured.
        ratio_between: 95 % interval of it; None of too few steps or rounds.
        in_turns: its steps that were measured in turns, if they were.
        blocks_ratio: FLOPs of its steps over the dense ones, `blocks`.
        model_ratio: the same, `model`.
        keeps_everything: its steps compute the full model.
        steps: how they went.
    """

    name: str
    from_step: int
    until_step: int
    timing: Timing | None
    tokens_per_s: float | None
    time_ratio: float | None
    ratio_between: Between | None
    in_turns: Turns | None
    blocks_ratio: float
    model_ratio: float
    keeps_everything: bool
    steps: Steps

    @property
    def num_steps(self) -> int:
        return self.until_step - self.from_step

    @property
    def median_step_s(self) -> float | None:
        return None if self.timing is None else self.timing.median_s

    @property
    def ratio_tells(self) -> bool:
        """Whether the time ratio is known well enough to be compared with that of the FLOPs."""
        return self.keeps_everything or _narrow(self.ratio_between, 1.0 - self.model_ratio)


@dataclass(frozen=True)
class Summary:
    """A run so far.

    Attributes:
        tokens: trained by all replicas together, of a branch also those before it.
        trained_s: what the steps up to the last logged one took, over all starts, of a branch also
            those before it; None where an earlier version did not count it.
        eval_loss: held-out loss at `eval_step`, nats per token; None before
            the first evaluation. Of several held-out corpora it is the mean.
        eval_losses: by the name of the corpus, where held-out corpora have names.
        eval_layers: depth of the model that was evaluated, of `num_layers`: one that grows is
            evaluated as it is.
        eval_bits: the held-out loss in bits per byte; None where that is not known.
        valid_entropy: unigram entropy of the held-out corpus, nats per token: the loss of a model
            that knows how frequent every token is in it and nothing else. Of several corpora the
            mean, as of the losses. None without a manifest.
        train_entropy: that of the training corpus; None also of weights that change.
        valid_bits, train_bits: the entropies in bits per byte.
        saved_blocks: fraction of the dense `blocks` FLOPs of the steps done that was saved.
        saved_model: the same of the `model` FLOPs.
        timed: the steps whose times are compared, and their layout.
        full_step_s: median step time over the phases that keep everything; None if no such
            step was timed.
        full_from: first step of the first phase that keeps everything; None if there is none.
        turns: step times that were measured in turns at the end; None of a run that was not.
        saved_time: fraction of the time saved against the same steps of the full model, by `turns`,
            or else by the median step time of every phase and `full_step_s`; evaluations and
            checkpoints do not count. None if a phase was not timed.
        saved_between: 95 % interval of it; None of too few steps or rounds.
        saved_cpu: the same of processor seconds, by `turns`; None without, and on a GPU.
        efficiency: `saved_time / saved_model`; None if nothing was to be saved.
        skipped: steps that were left out, their loss or gradient being no number or a spike.
        spikes: steps whose loss was a spike, and that were trained.
        parent: of a branch; its steps are not in the phases, and its tokens are in `tokens`.
    """

    run_dir: str
    method: str
    num_steps: int
    total_steps: int
    tokens: int
    trained_s: float | None
    train_loss: float
    eval_loss: float | None
    eval_step: int | None
    eval_losses: dict[str, float]
    eval_layers: int | None
    num_layers: int
    eval_bits: float | None
    valid_entropy: float | None
    valid_bits: float | None
    train_entropy: float | None
    train_bits: float | None
    saved_blocks: float
    saved_model: float
    phases: tuple[PhaseSummary, ...]
    timed: TimedLines
    full_step_s: float | None
    full_from: int | None
    turns: StepTimes | None
    saved_time: float | None
    saved_between: Between | None
    saved_cpu: float | None
    efficiency: float | None
    skipped: tuple[int, ...]
    spikes: tuple[int, ...]
    parent: Parent | None

    @property
    def time_s(self) -> float | None:
        """Training time, every phase at its median step time; None if one was not timed."""
        medians = [p.median_step_s for p in self.phases]
        if None in medians:
            return None
        return sum(p.num_steps * median_s for p, median_s in zip(self.phases, medians))

    @property
    def saving_tells(self) -> bool:
        """Whether the time saved is known well enough to be compared with the FLOPs saved."""
        return _narrow(self.saved_between, self.saved_model)


def _narrow(between: Between | None, promised: float) -> bool:
    """Whether an interval is at most half as wide as what the FLOPs promise: beyond that a saving
    as promised could hardly be told from another."""
    return between is not None and between[1] - between[0] <= promised / 2


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
    times = timed(run, full_lines)
    full_timing = times.timing(full_lines)
    skipped = tuple(e["step"] for e in run.events if "skipped" in e)
    phases = tuple(
        _phase(run, i, times, full_timing, i in full)
        for i, phase in enumerate(run.method.phases)
        if phase.from_step < run.steps_done and run.lines_of(i)
    )
    counted = sum(p.num_steps for p in phases)
    saved_blocks = 1.0 - sum(p.num_steps * p.blocks_ratio for p in phases) / counted
    saved_model = 1.0 - sum(p.num_steps * p.model_ratio for p in phases) / counted
    saving = _saving(phases, run.step_times)
    saves = saving.time is not None and not math.isclose(saved_model, 0.0, abs_tol=1e-12)
    data = run.config.data
    valid_entropy, valid_bits = _unigram_entropy({p: 1.0 for p in data.held_out.values()})
    train_entropy, train_bits = _unigram_entropy({p.corpus: p.weight for p in data.parts})
    last_evaluation = run.evaluations[-1] if run.evaluations else {}
    return Summary(
        run_dir=str(run.directory),
        method=run.config.method["name"],
        num_steps=run.steps_done,
        total_steps=run.config.steps,
        tokens=run.config.tokens_after(run.steps_done - len(skipped)),
        trained_s=run.steps[-1].get("trained_s"),
        train_loss=run.steps[-1]["loss"],
        eval_loss=last_evaluation.get("eval_loss"),
        eval_step=last_evaluation.get("step"),
        eval_losses={
            name: math.nan if loss is None else loss
            for name, loss in last_evaluation.get("eval_losses", {}).items()
        },
        eval_layers=run.method.depth(last_evaluation["step"]) if last_evaluation else None,
        num_layers=run.method.shape.num_layers,
        eval_bits=_bits_per_byte(run, last_evaluation),
        valid_entropy=valid_entropy,
        valid_bits=valid_bits,
        train_entropy=train_entropy,
        train_bits=train_bits,
        saved_blocks=saved_blocks,
        saved_model=saved_model,
        phases=phases,
        timed=times,
        full_step_s=full_timing.median_s if full_timing else None,
        full_from=run.method.phases[full[0]].from_step if full else None,
        turns=saving.turns,
        saved_time=saving.time,
        saved_between=saving.between,
        saved_cpu=saving.cpu,
        efficiency=saving.time / saved_model if saves else None,
        skipped=skipped,
        spikes=tuple(e["step"] for e in run.events if "spike" in e),
        parent=read_parent(run.directory),
    )


def _phase(
    run: RunFiles, i: int, times: TimedLines, full: Timing | None, keeps: bool
) -> PhaseSummary:
    phase, lines = run.method.phases[i], run.lines_of(i)

    def ratio(figure: str) -> float:
        return sum(e[f"{figure}_active"] for e in lines) / sum(e[f"{figure}_dense"] for e in lines)

    own = times.timing(lines)
    time_ratio, between = _time_ratio(own, full)
    in_turns = run.step_times.of_phase(i) if run.step_times else None
    if run.step_times and in_turns:
        time_ratio, between = middle(run.step_times.ratios(in_turns))
    return PhaseSummary(
        name=phase.name,
        from_step=max(phase.from_step, run.config.first_step),
        until_step=min(run.steps_done, phase.until_step),
        timing=own,
        tokens_per_s=run.tokens_per_step / own.median_s if own else None,
        time_ratio=time_ratio,
        ratio_between=between,
        in_turns=in_turns,
        blocks_ratio=ratio("blocks"),
        model_ratio=ratio("flops"),
        keeps_everything=keeps,
        steps=steps_of(lines),
    )


def _time_ratio(own: Timing | None, full: Timing | None) -> tuple[float | None, Between | None]:
    """Median over median of steps that were not measured in turns, and its 95 % interval."""
    if own is None or full is None:
        return None, None
    between = None
    if own.between_s and full.between_s:
        between = own.between_s[0] / full.between_s[1], own.between_s[1] / full.between_s[0]
    return own.median_s / full.median_s, between


@dataclass(frozen=True)
class _Saving:
    """The `turns`, `saved_time`, `saved_between` and `saved_cpu` of a summary."""

    turns: StepTimes | None
    time: float | None
    between: Between | None
    cpu: float | None


def _saving(phases: tuple[PhaseSummary, ...], turns: StepTimes | None) -> _Saving:
    """By what was measured in turns, if that is every phase that saves something."""
    of_phases = [p.in_turns for p in phases if not p.keeps_everything]
    if not turns or not of_phases or None in of_phases:
        return _Saving(None, *_saved_time(phases), None)
    on_cpu = turns.baseline.device_s is None
    cpu = middle(_saved(phases, turns, "cpu_s"))[0] if on_cpu else None
    return _Saving(turns, *middle(_saved(phases, turns, "step_s")), cpu)


def _saved(phases: tuple[PhaseSummary, ...], turns: StepTimes, of: str) -> list[float]:
    """Of every round, the fraction saved against as many steps of the full model."""
    counted = sum(p.num_steps for p in phases)
    saved = [0.0] * turns.num_rounds
    for phase in phases:
        if phase.in_turns and not phase.keeps_everything:
            for number, ratio in enumerate(turns.ratios(phase.in_turns, of)):
                saved[number] += phase.num_steps * (1.0 - ratio) / counted
    return saved


def _saved_time(phases: tuple[PhaseSummary, ...]) -> tuple[float | None, Between | None]:
    """Fraction of the time saved, and its 95 % interval: steps of the full model save nothing."""
    counted = sum(p.num_steps for p in phases)
    saving = [p for p in phases if not p.keeps_everything]

    def mean(ratios: list[float]) -> float:
        return sum(p.num_steps * (1.0 - ratio) for p, ratio in zip(saving, ratios)) / counted

    ratios, between = [p.time_ratio for p in saving], [p.ratio_between for p in saving]
    if None in [p.time_ratio for p in phases]:
        return None, None
    if None in between:
        return mean(ratios), None
    return mean(ratios), (mean([high for _, high in between]), mean([low for low, _ in between]))


def _bits_per_byte(run: RunFiles, evaluation: dict[str, Any]) -> float | None:
    """A held-out loss in bits per byte of text, the mean over the corpora as of the losses."""
    data = run.config.data
    losses = evaluation.get("eval_losses") or {"valid": evaluation.get("eval_loss")}
    if run.config.objective["name"] != "causal" or None in losses.values():
        return None
    bits = []
    for name, loss in losses.items():
        manifest = known_manifest(data.held_out[name]) if name in data.held_out else None
        apart = data.documents == "separate"
        bits.append(manifest.bits_per_byte(loss, apart=apart) if manifest else None)
    return None if None in bits else sum(bits) / len(bits)


def _unigram_entropy(weights: dict[str, float | None]) -> tuple[float | None, float | None]:
    """Nats per token and bits per byte, means over corpora by their manifests; None if one has
    none, stands elsewhere, or has no weight.

    Args:
        weights: by the prefix of the corpus.
    """
    manifests = [known_manifest(prefix) for prefix in weights]
    if None in manifests or None in weights.values():
        return None, None

    def mean(values: list[float]) -> float:
        return sum(map(operator.mul, values, weights.values())) / sum(weights.values())

    entropies = [manifest.unigram_entropy for manifest in manifests]
    bits = list(map(Manifest.bits_per_byte, manifests, entropies))
    return mean(entropies), None if None in bits else mean(bits)
