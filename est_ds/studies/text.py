"""A study in words, tables and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.table import Table

from est_ds.report.text import PLAIN, rendered
from est_ds.run.metrics import finite
from est_ds.studies.answers import Answers
from est_ds.studies.arms import ArmAnswer, Compared
from est_ds.studies.by_window import OverWindows
from est_ds.studies.downstream import downstream, downstream_text, downstream_texts
from est_ds.studies.results import Results, Times
from est_ds.studies.runs import Runs
from est_ds.studies.statistics import ALPHA, Gain, Interval
from est_ds.studies.study_file import Values
from est_ds.studies.tasks import TaskAnswer

BUDGETS = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}


def values_text(values: Values | None) -> str:
    """Tuned values in words."""
    if values is None:
        return "not known yet"
    return ", ".join(f"{field}={value}" for field, value in values) or "not tuned"


def interval_text(interval: Interval, sign: str = "+") -> str:
    """A mean and its 95 % interval."""
    text = f"{interval.mean:{sign}.4f}"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]"


def windows_text(over: OverWindows, pairs: int) -> str:
    """A difference and its interval over held-out windows, and of which seeds where not of all."""
    return f"{interval_text(over.interval)}{_few(over, pairs)}"


def half_width_text(over: OverWindows | None, pairs: int) -> str:
    """Half of an interval over held-out windows, and of which seeds where not of all."""
    if over is None or over.interval.low is None or over.interval.high is None:
        return "-"
    return f"+-{(over.interval.high - over.interval.low) / 2:.4f}{_few(over, pairs)}"


def _few(over: OverWindows, pairs: int) -> str:
    seeds = ", ".join(map(str, over.seeds))
    return "" if len(over.seeds) == pairs else f" (seed {seeds})"


def p_text(p: float) -> str:
    """A p value, never rounded to the limit that it is below or above."""
    if p < 0.0005:
        return "<0.001"
    digits = 3
    while float(f"{p:.{digits}f}") == ALPHA != p:
        digits += 1
    return f"{p:.{digits}f}"


def gain_text(gain: Gain | None) -> str:
    """A gain in compute and its 95 % interval, or what is known of it."""
    if gain is None:
        return "-"
    if gain.interval is None:
        return gain.bound
    ends = gain.interval
    if ends.low is None or ends.high is None:
        return f"{ends.mean:.2f}"
    return f"{ends.mean:.2f} [{ends.low:.2f}, {ends.high:.2f}]"


def verdict_text(compared: Compared | None) -> str:
    """A verdict in words."""
    if compared is None or compared.verdict is None:
        return "-"
    if compared.diverged:
        return f"costs ({len(compared.diverged)} diverged)"
    if compared.verdict != "undecided":
        return compared.verdict
    more = "over 1,000" if compared.more_seeds is None else compared.more_seeds
    return f"undecided ({more} more seed{'s' * (more != 1)})"


def answers_text(runs: Runs, answers: Answers) -> str:
    """Tables of a study of at most 100 columns, and what a reader must know."""
    parts: list[Any] = [_arms_table(answers)]
    for budget in runs.file.study.budgets:
        parts += ["", f"At equal {BUDGETS[budget]} (loss less the baseline's, nats a token):"]
        parts.append(_budget_table(answers, budget))
    if heads := task_heads(answers):
        parts += ["", TASKS, _table("arm", *heads)]
        for arm in answers.arms:
            parts[-1].add_row(arm.name, *task_cells(arm, heads))
        parts += ["", *downstream_texts(downstream(answers))]
    parts += ["", *notes(answers), *(f"warning: {warning}" for warning in answers.warnings)]
    return rendered(f"{runs.file.folder}: arms against {answers.arms[0].name}", *parts, width=100)


def _arms_table(answers: Answers) -> Table:
    table = _table("arm", "seeds", "held-out\nloss", "model\nFLOPs", "blocks\nFLOPs", "step\ntime")
    timed = any(arm.gain_seconds for arm in answers.arms)
    tuned = {tuple(field for field, _ in arm.values) for arm in answers.arms if arm.values}
    one = len(tuned) == 1 and len(next(iter(tuned))) == 1  # field, which its head names
    table.add_column("\ngain in FLOPs", no_wrap=True)
    if timed:
        table.add_column("\ngain in seconds", no_wrap=True)
    table.add_column(f"\n{next(iter(tuned))[0] if one else 'tuned'}", overflow="fold")
    for arm in answers.arms:
        loss = f"{arm.loss.mean:.4f}" if arm.loss else "-"
        ratios = (arm.flops_ratio, arm.blocks_ratio, arm.time_ratio)
        cells = (arm.name, str(len(arm.losses)), loss, *(ratio_text(r) for r in ratios))
        gains = (gain_text(arm.gain), *((gain_text(arm.gain_seconds),) if timed else ()))
        values = arm.values[0][1] if one and arm.values else values_text(arm.values)
        table.add_row(*cells, *gains, values)
    return table


def _budget_table(answers: Answers, budget: str) -> Table:
    table = _table(
        "arm",
        "steps of\nbaseline",
        "pairs",
        "differ-\nence",
        "95 % interval",
        "p\n(Holm)",
        "could\nsee",
    )
    table.padding = 0  # the box has a space of its own between columns; verdicts need room
    for i, column in enumerate(table.columns):
        column.no_wrap = i > 0  # what has no room for a long name folds it, and not a number
    table.add_column("\nverdict")
    for arm in answers.arms[1:]:
        compared = arm.budgets.get(budget)
        if compared is None:
            table.add_row(arm.name, *("-" for _ in range(7)))
            continue
        difference = compared.difference
        if difference is None:
            cells = ("0", "-", "-", "-", "-")
        else:
            seen = "-" if difference.detectable is None else f"{difference.detectable:.4f}"
            p = "-" if compared.corrected is None else p_text(compared.corrected)
            ends = difference.interval
            between = "-" if ends.low is None else f"{ends.low:+.4f} to {ends.high:+.4f}"
            cells = (str(difference.pairs), f"{ends.mean:+.4f}", between, p, seen)
        table.add_row(arm.name, f"{compared.steps:,}", *cells, verdict_text(compared))
    return table


TASKS = "Tasks: share of right answers, mean +- standard deviation over the seeds."


def task_heads(answers: Answers) -> list[str]:
    """The tasks that an arm was asked."""
    return list(dict.fromkeys(task for arm in answers.arms for task in arm.tasks))


def task_cells(arm: ArmAnswer, tasks: list[str]) -> list[str]:
    """What an arm scores in tasks."""
    return [_task_text(arm.tasks.get(task)) for task in tasks]


def _task_text(found: TaskAnswer | None) -> str:
    if found is None:
        return "-"
    spread = "" if found.spread is None else f" +- {found.spread:.4f}"
    return f"{found.mean.mean:.4f}{spread}"


WHOLE = ("arm", "95 % interval")  # columns whose cells stay on one line


def _table(*columns: str) -> Table:
    """A table of heads of at most two lines; what a cell has no room for goes on below its row."""
    table = Table(box=PLAIN, pad_edge=False, padding=(0, 1, 0, 0))
    lines = max(name.count("\n") for name in columns)
    for i, name in enumerate(columns):
        head = "\n" * (lines - name.count("\n")) + name
        justify = "right" if i else "left"
        table.add_column(head, justify=justify, overflow="fold", no_wrap=name in WHOLE)
    return table


def ratio_text(value: float | None) -> str:
    """A ratio, where it is known."""
    return "-" if value is None else f"{value:.3f}"


OVER_WINDOWS = (
    "Over windows (page, --json): the same runs on other held-out text, by a bootstrap of windows.",
    "Intervals over seeds hold the text fixed, those over windows the runs.",
)


def notes(answers: Answers) -> list[str]:
    """What explains the tables."""
    compared = [c for arm in answers.arms for c in arm.budgets.values()]
    return [
        "Below 0 the arm is better. Intervals are of 95 %, by Student's t over the seeds.",
        "Could see: the true difference that this number of seeds detects with a chance of 80 %.",
        "Verdicts, p and could see are by the number of arms (Holm), intervals and gains are not.",
        *(OVER_WINDOWS if any(c.windows for c in compared) else ()),
        "A gain of 1.1: the baseline needs 1.1 times as much for that loss.",
        f"The verdict of the study is that at equal {BUDGETS[answers.decides]}.",
    ]


def verdicts(answers: Answers) -> list[tuple[str, str]]:
    """Every arm with its verdict, at the budget that decides."""
    return [(arm.name, verdict_text(arm.budgets.get(answers.decides))) for arm in answers.arms[1:]]


# More arms than a few of one verdict are named together.
FEW = 3
TOGETHER: dict[str | None, str] = {
    "costs": "cost",
    "no difference": "make no difference",
    "undecided": "are undecided",
    None: "have no verdict yet",
}


def headline(answers: Answers) -> str:
    """The verdicts in a sentence."""
    said: dict[str | None, list[str]] = {}
    for arm in answers.arms[1:]:
        sentence = _said(arm, arm.budgets.get(answers.decides))
        said.setdefault(_verdict(answers, arm), []).append(sentence)
    decided = said.get("pays", ["nothing is shown to pay"] if said.keys() - {None} else [])
    for verdict, together in TOGETHER.items():
        found = said.get(verdict, [])
        if len(found) > FEW:
            names = [arm.name for arm in answers.arms[1:] if _verdict(answers, arm) == verdict]
            found = [f"{len(found)} arms {together} ({', '.join(names)})"]
        decided = [*decided, *found]
    at_equal = f"At equal {BUDGETS[answers.decides]}"
    return f"{at_equal} {'; '.join(decided)}." if decided else "There is no arm but the baseline."


def _verdict(answers: Answers, arm: ArmAnswer) -> str | None:
    compared = arm.budgets.get(answers.decides)
    return compared.verdict if compared else None


def _said(arm: ArmAnswer, compared: Compared | None) -> str:
    """A verdict as part of a sentence."""
    difference = compared.difference if compared else None
    if compared and compared.diverged:
        return f"{arm.name} {verdict_text(compared)}"
    if not compared or not difference:
        return f"{arm.name} is not known yet"
    by = f"{interval_text(difference.interval)} nats a token"
    if compared.verdict is None:
        return f"{arm.name} is at {by} ({compared.unsure or 'one seed'})"
    if compared.verdict == "no difference":
        return f"{arm.name} makes no difference"
    if compared.verdict == "undecided":
        return f"{arm.name} is {verdict_text(compared)}: {by}"
    return f"{arm.name} {compared.verdict} ({by})"


def times_text(times: Times) -> str:
    """Step times of the arms, and how busy the machine was."""
    lines = [f"step times in turns, {times.device}, {times.processes} processes a run:"]
    for name, arm in times.arms.items():
        cpu = "" if arm.cpu_ratio is None else f", processor time {arm.cpu_ratio:.3f}"
        spread = "" if arm.spread is None else f" (+- {arm.spread:.1%})"
        lines.append(f"  {name}: {arm.ratio:.3f} of the baseline's{spread}{cpu}")
    if times.busy is not None:
        lines.append(f"other programs kept {times.busy:.1f} processors busy meanwhile")
    return "\n".join(lines)


def answers_json(runs: Runs, answers: Answers, results: Results) -> str:
    """The document of `est-ds compare --json`."""
    document = {
        "study": str(runs.file.folder),
        "baseline": answers.arms[0].name,
        "decides": answers.decides,
        "seeds": list(runs.file.seeds),
        "runs": len(results.runs),
        "arms": {arm.name: _arm_json(arm) for arm in answers.arms},
        "curves": {seed: asdict(curve) for seed, curve in answers.curves.items()},
        "downstream": {
            task: asdict(found) | {"said": downstream_text(task, found)}
            for task, found in downstream(answers).items()
        },
        "warnings": list(answers.warnings),
    }
    return json.dumps(finite(document), indent=1, allow_nan=False)


def _arm_json(arm: ArmAnswer) -> dict[str, Any]:
    found = asdict(arm)
    found.pop("name")
    values = found.pop("values")
    found["tuned"] = None if values is None else {f: json.loads(v) for f, v in arm.values or ()}
    return found
