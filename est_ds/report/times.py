"""Step times that may be compared: of one layout, without start-ups, and with their spread."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import Any

import numpy as np

from est_ds.report.files import RunFiles

# The first steps of a start allocate, open connections and record what ZeRO 3 gathers.
START_UP_STEPS = 3
# Neighbours take alike times on a machine that others use too: an interval is of so many parts.
PARTS = 20
CONFIDENCE = 0.95
Between = tuple[float, float]
OPTIONS = ("offload", "activation_checkpointing", "compile")


@dataclass(frozen=True)
class Timing:
    """The times of some steps.

    Attributes:
        count: how many were timed.
        between_s: ends of an interval that holds the median with a probability of 95 % or more;
            None of fewer than 6 steps.
    """

    count: int
    median_s: float
    between_s: Between | None


def timing(times: list[float]) -> Timing | None:
    """Median and interval of times in their order; None of none."""
    return Timing(len(times), *middle(times)) if times else None


def middle(values: list[float]) -> tuple[float, Between | None]:
    """Median of values in their order, and an interval that holds it with a probability of 95 % or
    more; None of fewer than 6.

    The interval is that of order statistics (it takes no distribution for granted): of n medians of
    consecutive parts the k-th smallest and the k-th largest, with the largest k for which n coins
    show fewer than k heads, or fewer than k tails, in 5 % of all throws.
    """
    parts = np.array_split(np.array(values), min(len(values), PARTS))
    medians, found = sorted(median(part.tolist()) for part in parts), median(values)
    k = _rank(len(medians))
    return found, (min(medians[k - 1], found), max(medians[-k], found)) if k else None


def _rank(count: int) -> int:
    """The k of `middle`; 0 if there is none."""
    k, outside = 0, 2 * comb(count, 0) / 2**count
    while outside <= 1 - CONFIDENCE:
        k += 1
        outside += 2 * comb(count, k) / 2**count
    return k


@dataclass(frozen=True)
class TimedLines:
    """The lines whose times are compared.

    Attributes:
        layout: theirs; None: they do not say.
        steps: of them all.
        start_ups: lines of this layout that are left out, their processes having just started.
        elsewhere: lines of other layouts.
    """

    layout: dict[str, Any] | None
    steps: frozenset[int]
    start_ups: int
    elsewhere: int

    def timing(self, lines: list[dict[str, Any]]) -> Timing | None:
        return timing([e["step_s"] for e in lines if e["step"] in self.steps])


def timed(run: RunFiles, full: list[dict[str, Any]]) -> TimedLines:
    """Chooses one layout: that in which most steps of the full model were timed; then, most steps.

    Args:
        full: lines of the phases that keep everything.
    """
    beginnings = {phase.from_step for phase in run.method.phases}
    full_steps = {e["step"] for e in full}
    layouts: dict[str, list[dict[str, Any]]] = {}
    for entry in run.steps:
        layouts.setdefault(json.dumps(entry.get("layout"), sort_keys=True), []).append(entry)
    found = []
    for key, lines in layouts.items():
        warm = frozenset(e["step"] for e in lines if not _starts_up(e, beginnings))
        elsewhere = len(run.steps) - len(lines)
        found.append(TimedLines(json.loads(key), warm, len(lines) - len(warm), elsewhere))
    # Of equals the later one.
    return max(reversed(found), key=lambda t: (len(t.steps & full_steps), len(t.steps)))


def _starts_up(entry: dict[str, Any], beginnings: set[int]) -> bool:
    start = entry.get("start", 0)
    compiles = (entry.get("layout") or {}).get("compile") and entry["step"] in beginnings
    return bool(compiles) or start <= entry["step"] < start + START_UP_STEPS


def layout_text(layout: dict[str, Any] | None) -> str:
    """A layout in words."""
    if layout is None:
        return "unknown layout (metrics.jsonl does not say it)"
    return ", ".join(
        [
            f"{layout['pipe']} pipe stages x {layout['replicas']} replicas",
            f"ZeRO {layout['zero']}",
            f"micro-batch {layout['micro']}",
            layout["device"],
            *(name for name in OPTIONS if name in layout),
        ]
    )
