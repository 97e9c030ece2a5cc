"""A summary in words and in tables."""

from __future__ import annotations

import io
from typing import Any

from rich.box import Box
from rich.console import Console
from rich.table import Table

from est_ds.report.summary import PhaseSummary, Summary

# Names of runs and phases are shown as they are.
QUIET: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
# A rule under the heads and nothing else; ASCII, for terminals and files of any encoding.
PLAIN = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)

PHASE_COLUMNS = (
    "phase",
    "steps",
    "median\nstep",
    "tokens\nper second",
    "time\nratio",
    "model\nFLOPs",
    "blocks\nFLOPs",
)


def print_tables(summary: Summary) -> None:
    """Prints a summary: fits 80 columns, needs no colour."""
    note = "Ratios are to a step of the full model."
    parts = (facts_table(fact_rows(summary)), phase_table(summary), note)
    console = Console(**QUIET)
    if console.is_terminal:
        _show(console, title(summary), *parts)
    else:
        print(rendered(title(summary), *parts))


def rendered(title: str, *parts: Table | str) -> str:
    """Title, tables and notes as plain text of at most 80 columns (a long title aside)."""
    console = Console(file=io.StringIO(), width=80, **QUIET)
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
    table = Table(box=PLAIN, pad_edge=False)
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
    rows = [
        ("tokens trained", f"{summary.tokens:,}"),
        ("held-out loss", _loss(summary)),
        ("unigram entropy", _entropy(summary)),
    ]
    for name, steps in (("steps left out", summary.skipped), ("loss spikes", summary.spikes)):
        if steps:
            shown = ", ".join(f"{step:,}" for step in steps[:8]) + ", ..." * (len(steps) > 8)
            rows.append((name, f"{len(steps):,}: step {shown} (why: metrics.jsonl)"))
    if _is_dense(summary):
        return rows + [
            ("FLOPs saved", "none: every step trained the full model"),
            ("training time", seconds(summary.time_s) + " at median step times"),
        ]
    rows += [
        ("FLOPs saved", f"{summary.saved_blocks:.1%} blocks, {summary.saved_model:.1%} model"),
        ("time saved", _time(summary)),
    ]
    if summary.efficiency is not None:
        rows.append(
            ("saving efficiency", f"{summary.efficiency:.2f} (time saved / model FLOPs saved)")
        )
    return rows


def phase_row(phase: PhaseSummary) -> tuple[str, ...]:
    """Cells under PHASE_COLUMNS."""
    return (
        phase.name,
        f"{phase.from_step:,}-{phase.until_step - 1:,}",
        seconds(phase.median_step_s),
        f"{phase.tokens_per_s:,.0f}",
        "-" if phase.time_ratio is None else f"{phase.time_ratio:.3f}",
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


def _is_dense(summary: Summary) -> bool:
    return all(phase.keeps_everything for phase in summary.phases)


def _loss(summary: Summary) -> str:
    if summary.eval_loss is None or summary.eval_step is None:
        return f"not evaluated yet; last training loss {summary.train_loss:.4f}"
    each = ", ".join(f"{name} {loss:.4f}" for name, loss in summary.eval_losses.items())
    return (
        f"{summary.eval_loss:.4f} nats per token, full model after "
        f"{summary.eval_step + 1:,} steps" + (f"; {each}" if each else "")
    )


def _entropy(summary: Summary) -> str:
    found = {"held-out": summary.valid_entropy, "training": summary.train_entropy}
    known = [f"{value:.4f} ({name} corpus)" for name, value in found.items() if value is not None]
    absent = [name for name, value in found.items() if value is None]
    if absent:
        unknown = f"unknown for the {' and '.join(absent)} corpus"
        known.append(f"{unknown} (no manifest, or changing weights)")
    return ", ".join(known)


def _time(summary: Summary) -> str:
    if summary.full_from is None:
        return "unknown: no phase trains the full model; compare with a dense run"
    if summary.saved_time is None or summary.full_step_s is None:
        return f"not known before the full model trains (from step {summary.full_from:,})"
    full_s = summary.num_steps * summary.full_step_s
    return (
        f"{summary.saved_time:.1%} measured: {seconds(summary.time_s)}, and "
        f"{seconds(full_s)} at full-model steps"
    )
