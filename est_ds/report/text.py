"""A summary in words and in tables."""

from __future__ import annotations

import io
import os
from typing import Any

from rich.box import Box
from rich.console import Console
from rich.table import Table

from est_ds.report.summary import PhaseSummary, Summary, summarise
from est_ds.report.times import Timing, layout_text
from est_ds.run.metrics import depth_text, use_texts
from est_ds.run.step_times import StepTimes

# Names of runs and phases are shown as they are.
QUIET: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
# A rule under the heads and nothing else; ASCII, for terminals and files of any encoding.
PLAIN = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)

PHASE_COLUMNS = (
    "phase",
    "steps",
    "timed",
    "median\nstep",
    "spread\nin %",
    "tokens/\nsecond",
    "time\nratio",
    "model\nFLOPs",
    "blocks\nFLOPs",
)


def print_tables(summary: Summary) -> None:
    """Prints a summary: fits 80 columns, needs no colour."""
    parts = (facts_table(fact_rows(summary)), phase_table(summary), *notes(summary))
    console = Console(**QUIET)
    if console.is_terminal:
        _show(console, title(summary), *parts)
    else:
        print(rendered(title(summary), *parts))


def rendered(title: str, *parts: Table | str, width: int = 80) -> str:
    """Title, tables and notes as plain text of at most 80 columns (a long title aside)."""
    console = Console(file=io.StringIO(), width=width, **QUIET)
    with console.capture() as capture:
        _show(console, title, *parts)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _show(console: Console, title: str, *parts: Table | str) -> None:
    console.print()
    console.print(title, style="bold", soft_wrap=True)
    for part in parts:
        if isinstance(part, str):
            console.print(part, style="dim", soft_wrap=True)
        else:
            console.print(part)


def facts_table(rows: list[tuple[str, str]]) -> Table:
    """Names and texts side by side."""
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def phase_table(summary: Summary) -> Table:
    """One row a phase."""
    table = Table(box=PLAIN, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(PHASE_COLUMNS):
        justify = "right" if i else "left"
        table.add_column(name, justify=justify, vertical="bottom", overflow="fold")
    for phase in summary.phases:
        table.add_row(*phase_row(phase))
    return table


def title(summary: Summary) -> str:
    part = "" if summary.num_steps == summary.total_steps else f"{summary.num_steps:,} of "
    return f"{summary.run_dir}: method {summary.method}, {part}{summary.total_steps:,} steps"


def fact_rows(summary: Summary) -> list[tuple[str, str]]:
    """What the run did, as (name, text)."""
    parent = summary.parent
    rows = [
        *([("branch of", f"{parent.run_dir} at step {parent.step:,}")] if parent else []),
        ("tokens trained", _trained(summary)),
        ("held-out loss", _loss(summary)),
        ("unigram entropy", _entropy(summary)),
    ]
    for name, steps in (("steps left out", summary.skipped), ("loss spikes", summary.spikes)):
        if steps:
            shown = ", ".join(f"{step:,}" for step in steps[:8]) + ", ..." * (len(steps) > 8)
            rows.append((name, f"{len(steps):,}: step {shown} of metrics.jsonl, which says why"))
    rows += _how_steps_went(summary)
    rows.append(("steps timed", _timed(summary)))
    if _is_dense(summary):
        time_s = summary.time_s
        return rows + [
            ("FLOPs saved", "none: every step computed the full model"),
            ("training time", _absent(summary) if time_s is None else _at_medians(time_s)),
        ]
    rows += [
        ("FLOPs saved", f"{summary.saved_blocks:.1%} blocks, {summary.saved_model:.1%} model"),
        ("time saved", _time(summary)),
    ]
    if summary.turns:
        rows.append(("machine", machine_text(summary.turns, summary.saved_cpu)))
    if summary.efficiency is not None and summary.saving_tells:
        low, high = (bound / summary.saved_model for bound in summary.saved_between)
        text = f"{summary.efficiency:.2f} (time saved / model FLOPs saved)"
        rows.append(("saving efficiency", f"{text}; 95 % interval {low:.2f} to {high:.2f}"))
    return rows


def notes(summary: Summary) -> list[str]:
    """What stands under the phases."""
    found = [
        "Steps count from 1, in metrics.jsonl from 0. Times are medians of the timed",
        "steps; spread: their 95 % interval. Ratios are to a step of the full model.",
    ]
    if summary.turns:
        found.append("Those of time were measured in turns at the end: medians of the rounds.")
    if any(p.time_ratio is not None and not p.ratio_tells for p in summary.phases):
        found.append("?: too few steps, or times that spread further than what the FLOPs save.")
    return found


def phase_row(phase: PhaseSummary) -> tuple[str, ...]:
    """Cells under PHASE_COLUMNS."""
    return (
        phase.name,
        f"{phase.from_step + 1:,}-{phase.until_step:,}",
        f"{phase.timing.count:,}" if phase.timing else "0",
        seconds(phase.timing.median_s) if phase.timing else "-",
        _interval(phase.timing),
        f"{phase.tokens_per_s:,.0f}" if phase.timing else "-",
        _ratio(phase),
        f"{phase.model_ratio:.3f}",
        f"{phase.blocks_ratio:.3f}",
    )


def seconds(duration_s: float) -> str:
    """A duration in the unit that suits it."""
    if duration_s < 1.0:
        return f"{duration_s * 1000:.3g} ms"
    if duration_s < 120.0:
        return f"{duration_s:.{2 if duration_s < 10.0 else 1}f} s"
    minutes = duration_s / 60.0
    return f"{minutes:.1f} min" if minutes < 120.0 else f"{minutes / 60.0:.1f} h"


def gibibytes(size_bytes: float) -> str:
    """A size of memory in GiB, or in MiB where it is less than one."""
    name, unit = ("GiB", 2**30) if size_bytes >= 2**30 else ("MiB", 2**20)
    return f"{number(size_bytes / unit)} {name}"


def number(size: float) -> str:
    """Three digits, or a whole number."""
    if size >= 100 or not size:
        return f"{size:,.0f}"
    return f"{size:.1f}" if size >= 10 else f"{size:.2f}"


def _how_steps_went(summary: Summary) -> list[tuple[str, str]]:
    """Clipping and updates of every phase, where its lines know them."""
    phases = [(phase.name, phase.steps) for phase in summary.phases]
    clipped = [f"{name} {s.clipped:.1%}" for name, s in phases if s.clipped is not None]
    updates = [f"{name} {s.update_rms:.2g}" for name, s in phases if s.update_rms is not None]
    rows = []
    if clipped:
        rows.append(("clipped", f"{', '.join(clipped)} of the logged steps"))
    if updates:
        counted = sum(s.measured for _, s in phases)
        rows.append(
            ("update / lr", f"{', '.join(updates)} (RMS over the layers, {counted:,} steps)")
        )
    for phase in summary.phases:
        if texts := use_texts(phase.steps.used):
            rows.append((f"GPUs, {phase.name}", ", ".join(texts)))
    return rows


def _trained(summary: Summary) -> str:
    text = f"{summary.tokens:,}"
    return (
        text if summary.trained_s is None else f"{text}, in {seconds(summary.trained_s)} of steps"
    )


def _is_dense(summary: Summary) -> bool:
    return all(phase.keeps_everything for phase in summary.phases)


def _interval(timing: Timing | None) -> str:
    if timing is None or timing.between_s is None:
        return "-"
    return " ".join(f"{100 * (end / timing.median_s - 1):+.0f}" for end in timing.between_s)


def _ratio(phase: PhaseSummary) -> str:
    if phase.time_ratio is None:
        return "-"
    return f"{phase.time_ratio:.3f}" if phase.ratio_tells else "?"


def _loss(summary: Summary) -> str:
    if summary.eval_loss is None or summary.eval_step is None:
        return f"not evaluated yet; last training loss {summary.train_loss:.4f}"
    each = ", ".join(f"{name} {loss:.4f}" for name, loss in summary.eval_losses.items())
    model = depth_text(summary.eval_layers, summary.num_layers)
    return (
        f"{_per_token(summary.eval_loss, summary.eval_bits)}, {model} after "
        f"{summary.eval_step + 1:,} steps" + (f"; {each}" if each else "")
    )


def _per_token(nats: float, bits: float | None) -> str:
    known = "" if bits is None else f" ({bits:.4f} bits per byte)"
    return f"{nats:.4f} nats per token{known}"


def _entropy(summary: Summary) -> str:
    found = {
        "held-out": (summary.valid_entropy, summary.valid_bits),
        "training": (summary.train_entropy, summary.train_bits),
    }
    known = [f"{_per_token(*both)}, {name}" for name, both in found.items() if both[0] is not None]
    absent = [name for name, (nats, _) in found.items() if nats is None]
    if absent:
        unknown = f"unknown for the {' and '.join(absent)} corpus"
        known.append(f"{unknown} (no manifest, or changing weights)")
    return "; ".join(known)


def _timed(summary: Summary) -> str:
    timed = summary.timed
    left_out = [
        f"{count:,} {what}"
        for count, what in (
            (timed.start_ups, "after a start"),
            (timed.elsewhere, "in another layout"),
        )
        if count
    ]
    text = f"{len(timed.steps):,} in {layout_text(timed.layout)}"
    return text + (f"; left out: {' and '.join(left_out)}" if left_out else "")


def _at_medians(time_s: float) -> str:
    return seconds(time_s) + " at median step times"


def _absent(summary: Summary) -> str:
    phases = [phase.name for phase in summary.phases if phase.timing is None]
    return f"not known: no step of {', '.join(phases)} was timed in this layout"


def machine_text(turns: StepTimes, saved_cpu: float | None = None) -> str:
    """How busy the machine was in the rounds, and what processor seconds say."""
    used = f"other processes used {turns.others:.2g} of {turns.processors} processors"
    text = f"busy in these rounds: {used}" if turns.is_busy else f"quiet: {used}"
    return text if saved_cpu is None else f"{text}; {saved_cpu:.1%} of processor seconds saved"


def _in_turns(summary: Summary, turns: StepTimes) -> str:
    assert summary.saved_time is not None
    rounds = f"in {turns.num_rounds} rounds of turns at the end of the run"
    if summary.saved_between is None:
        return f"not known: an interval takes 6 rounds; {summary.saved_time:.1%} {rounds}"
    low, high = summary.saved_between
    if not summary.saving_tells:
        return f"not known: between {low:.1%} and {high:.1%} {rounds}"
    return f"{summary.saved_time:.1%} measured {rounds}; 95 % interval {low:.1%} to {high:.1%}"


def _time(summary: Summary) -> str:
    if summary.turns:
        return _in_turns(summary, summary.turns)
    if summary.full_from is None:
        return "unknown: no phase trains the full model; compare with a dense run"
    if summary.num_steps <= summary.full_from:
        return f"not known before the full model trains (from step {summary.full_from + 1:,})"
    if summary.saved_time is None or summary.time_s is None or summary.full_step_s is None:
        return _absent(summary)
    if summary.saved_between is None:
        return "not known: an interval takes 6 timed steps of every phase"
    low, high = summary.saved_between
    if not summary.saving_tells:
        return f"not known: between {low:.1%} and {high:.1%}, as far as the step times spread"
    full_s = sum(p.num_steps for p in summary.phases) * summary.full_step_s
    return (
        f"{summary.saved_time:.1%} measured: {seconds(summary.time_s)}, and "
        f"{seconds(full_s)} at full-model steps; 95 % interval {low:.1%} to {high:.1%}"
    )


def print_summary(run_dir: str | os.PathLike) -> None:
    """Prints the summary of a run directory: fits 80 columns, needs no colour.

    Raises:
        UserError: it is no run directory, or its metrics are missing or incomplete.
    """
    print_tables(summarise(run_dir))
