"""The page of a study: one HTML file with its answers, tables and figures."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from est_ds.report.analyses import analyses
from est_ds.report.curves import SHOWN
from est_ds.report.frame import row, write_whole
from est_ds.report.interactive import figure_html, page, warnings_html, wide_table
from est_ds.report.text import seconds
from est_ds.studies import plots, run_plots
from est_ds.studies.answers import Answers
from est_ds.studies.arms import ArmAnswer
from est_ds.studies.boundary_map import boundary_map
from est_ds.studies.boundary_plot import boundaries
from est_ds.studies.downstream import downstream, downstream_texts
from est_ds.studies.downstream_plot import downstream_plot
from est_ds.studies.results import Results, RunResult
from est_ds.studies.runs import Chooser, Runs, wanted_runs
from est_ds.studies.snapshot import Snapshot
from est_ds.studies.text import (
    BUDGETS,
    TASKS,
    gain_text,
    half_width_text,
    headline,
    interval_text,
    notes,
    ratio_text,
    task_cells,
    task_heads,
    values_text,
    verdict_text,
)

FILE = "study.html"

END_POINTS = (
    "Every point is the end of a run that was trained to the end of its own schedule: open ones "
    "are seeds, filled ones their mean, with the 95 % interval of that mean. Black is {baseline} "
    "at several budgets; {fit}. An arm below the black line reaches its loss for less. Bars hold "
    "what seeds have in common, so that they say little about differences: those are below."
)
FIT = (
    "its line is the fit L = E + A C^-a, the mean of the seeds' fits, drawn between the costs that "
    "were trained, since beyond them it says nothing"
)
NO_FIT = "no line is fitted, which takes finished runs of three budgets (dense_curve)"
DIFFERENCES = (
    "Loss of an arm less that of {baseline} with the same seed: left of the line the arm is "
    "better. Open points are seeds, filled ones their mean with its 95 % interval (Student's t, "
    "not corrected for the number of arms; the verdicts are, by Holm). The pointer also shows the "
    "interval over held-out windows, where it is known."
)
GAINS = (
    "How many times an arm's cost {baseline} needs for the arm's loss, read from its fitted curve: "
    "right of the line the arm is cheaper. Bars are 95 % intervals over the seeds. A triangle "
    "points to where the gain lies beyond the costs that were trained: it is a bound. An arm "
    "without a point has no gain that can be told. Rounds of tuning are not counted."
)
MAP = (
    "Arms of one method by the ends of their first two phases; a list chooses method and rates. In "
    "a square: the difference from {baseline} at equal {budget} in nats a token (blue is better, "
    "red is worse), and the gain in FLOPs."
)
DOWNSTREAM = (
    "What the arms score in a task over their held-out loss at the end of their runs: open points "
    "are seeds, filled ones their mean, with the standard deviation over the seeds. Dotted: runs "
    "of {baseline} of other budgets; an arm above them scores more than {baseline} does at that "
    "loss. A correlation is of the arms' means; an arm of one seed counts as much as others. "
)
CURVES = (
    "The full model's held-out loss while it trains; of one that grows, as deep as it was then. "
    "Bold: mean of the seeds; thin: seeds. Only the ends can be compared, since before them the "
    f"learning rate has not decayed, and subnetworks are trained. {SHOWN}"
)
SECONDS = (
    "Seconds are steps times the step time measured in turns, on one machine; within a run they "
    "are spread as its FLOPs are. Evaluations, checkpoints and starts do not count."
)
NO_SECONDS = "Seconds are not known: step times were not measured."
TUNING = (
    "Held-out loss on the first seed; where several fields are tuned, the lowest over the others. "
    "The large point is the value chosen. Runs that diverged have no point. One seed: differences "
    "between neighbours may be chance."
)
BOUNDARIES = (
    "Losses at the weights between two phases, means of the seeds, drawn a little apart. Filled: "
    "full model. Open: subnetworks of the phase before and of the phase after. The line is the "
    "full model's held-out loss at the usual evaluations. The list chooses the boundary."
)


def write_page(runs: Runs, answers: Answers, results: Results) -> Path:
    """Writes `study.html` into the folder of a study, finished or not, whole or not at all.

    Returns:
        The path of the page.

    Raises:
        UserError: the page cannot be written.
    """
    file = runs.file.folder / FILE
    write_whole(file, render(Snapshot(runs, answers, results)), "make study_dir writable")
    return file


def render(snapshot: Snapshot) -> str:
    """The page as text; well-formed XML too, scripts aside."""
    answers, folder = snapshot.answers, str(snapshot.runs.file.folder)
    parts = [
        f"<h1>{escape(folder)}</h1>",
        f'<p class="headline">{escape(headline(answers))}</p>',
        f'<p class="lead">{escape(_lead(snapshot))}</p>',
        wide_table(*_verdicts(snapshot)),
        f'<p class="note">{escape(" ".join(notes(answers)))}</p>',
        *_tasks(answers),
        warnings_html(answers.warnings),
        *(f"<h2>{escape(name)}</h2>\n{html}" for name, html in _figures(snapshot)),
        analyses(snapshot.runs.file.folder),
        "<h2>Runs</h2>",
        wide_table(*_runs(snapshot)),
        "<h2>Study file</h2>",
        f"<pre>{escape(snapshot.runs.file.file.read_text())}</pre>",
        "<h2>Versions and devices</h2>",
        f'<table class="facts">{"".join(row(r, "th", "td") for r in _made_by(snapshot))}</table>',
        '<p class="note">Of the runs, not of the installation that drew this page.</p>',
    ]
    return page(f"{folder}: est_ds study", "\n".join(part for part in parts if part))


def _lead(snapshot: Snapshot) -> str:
    """How far the study is."""
    file, results = snapshot.runs.file, snapshot.results
    wanted = wanted_runs(snapshot.runs, Chooser(results.losses, snapshot.time_ratios, guess=True))
    done = len(wanted.by_key.keys() & results.runs.keys())
    run = wanted.runs[0]
    seeds = ", ".join(str(seed) for seed in file.seeds)
    return (
        f"{done} of {len(wanted.runs)} runs finished. Baseline {file.baseline.name}: "
        f"{snapshot.runs.parameters(run):,} parameters, {run.steps:,} steps, {run.tokens:,} "
        f"tokens. Seeds {seeds}."
    )


def _tasks(answers: Answers) -> Iterator[str]:
    """The table of tasks, where there are some."""
    if heads := task_heads(answers):
        rows = [[arm.name, *task_cells(arm, heads)] for arm in answers.arms]
        yield "<h2>Tasks</h2>"
        yield wide_table(["arm", *heads], rows)
        yield f'<p class="note">{escape(TASKS)}</p>'


def _verdicts(snapshot: Snapshot) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of answers."""
    budgets = snapshot.runs.file.study.budgets
    heads = [
        "arm",
        "seeds",
        "held-out loss",
        *(f"difference at equal {BUDGETS[b]}" for b in budgets),
    ]
    heads += [
        "over windows",
        "verdict",
        "could see",
        "gain in FLOPs",
        "gain in seconds",
        "step time",
    ]
    return heads, [_verdict(snapshot, arm) for arm in snapshot.answers.arms]


def _verdict(snapshot: Snapshot, arm: ArmAnswer) -> list[str]:
    cells = [arm.name, str(len(arm.losses)), f"{arm.loss.mean:.4f}" if arm.loss else "-"]
    for budget in snapshot.runs.file.study.budgets:
        compared = arm.budgets.get(budget)
        known = compared and compared.difference
        cells.append(interval_text(compared.difference.interval) if known else "-")
    decides = arm.budgets.get(snapshot.answers.decides)
    difference = decides.difference if decides else None
    seen_by = difference.detectable if difference else None
    cells += [half_width_text(decides.windows, difference.pairs) if decides and difference else "-"]
    cells += ["baseline" if arm is snapshot.baseline else verdict_text(decides)]
    cells += ["-" if seen_by is None else f"{seen_by:.4f}"]
    cells += [gain_text(arm.gain), gain_text(arm.gain_seconds), ratio_text(arm.time_ratio)]
    return [text.replace(" [", "\n[").replace(" (", "\n(") for text in cells]


def _figures(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """Headings with figures, of those that have something to show."""
    name = snapshot.baseline.name
    timed = f" {SECONDS if snapshot.step_s else NO_SECONDS}"
    figure, out = plots.end_points(snapshot)
    if figure.data:
        fit = FIT if snapshot.answers.curves else NO_FIT
        caption = END_POINTS.format(baseline=name, fit=fit) + timed + _out(out)
        yield "End points", figure_html(figure, "ends", caption)
    if any(c.difference for arm in snapshot.answers.arms for c in arm.budgets.values()):
        figure, out = plots.differences(snapshot)
        caption = DIFFERENCES.format(baseline=name) + _out(out)
        yield "Paired differences", figure_html(figure, "differences", caption)
    if figure := plots.gains(snapshot):
        yield "Gain", figure_html(figure, "gains", GAINS.format(baseline=name))
    if figure := boundary_map(snapshot):
        caption = MAP.format(baseline=name, budget=BUDGETS[snapshot.answers.decides])
        yield "Map of boundaries", figure_html(figure, "map", caption)
    tasks = downstream(snapshot.answers)
    if figure := downstream_plot(snapshot, tasks):
        caption = DOWNSTREAM.format(baseline=name) + " ".join(downstream_texts(tasks))
        yield "Held-out loss against tasks", figure_html(figure, "downstream", caption)
    if figure := run_plots.held_out_curves(snapshot):
        yield "Held-out loss while training", figure_html(figure, "curves", CURVES + timed)
    for number, (field, figure) in enumerate(run_plots.tuning_curves(snapshot).items()):
        yield f"Tuning of {field}", figure_html(figure, f"tuning_{number}", TUNING)
    if figure := boundaries(snapshot):
        yield "Phase boundaries", figure_html(figure, "boundaries", BOUNDARIES)


def _out(names: list[str]) -> str:
    if not names:
        return ""
    return f" Too far out to be shown at first: {', '.join(names)}; a double click shows all."


def _runs(snapshot: Snapshot) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of all runs."""
    heads = ["arm", "seed", "tuned", "steps", "tokens", "model FLOPs", "blocks FLOPs"]
    heads += ["held-out loss", "bits a byte", "device", "finished"]
    results = snapshot.results.runs.values()
    order = {name: i for i, name in enumerate(arm.name for arm in snapshot.answers.arms)}
    ordered = sorted(
        results, key=lambda r: (order.get(r.arm, len(order)), r.seed, r.steps, r.loss or 0)
    )
    return heads, [_run(result) for result in ordered]


def _run(result: RunResult) -> list[str]:
    return [
        result.arm,
        str(result.seed),
        values_text(tuple(result.values.items())),
        f"{result.steps:,}",
        f"{result.tokens:,}",
        f"{result.flops:.4g}",
        f"{result.blocks_flops:.4g}",
        "diverged" if result.loss is None else f"{result.loss:.4f}",
        "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}",
        result.device or "-",
        result.finished[:16].replace("T", " ") or "-",
    ]


def _made_by(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """What trained the runs; several values where runs differ."""
    results, times = snapshot.results.runs.values(), snapshot.results.times
    devices = sorted({r.device for r in results if r.device})
    yield "devices", ", ".join(devices) or "not known"
    for name in dict.fromkeys(name for r in results for name in r.versions):
        yield name, ", ".join(sorted({r.versions[name] for r in results if name in r.versions}))
    if times:
        busy = (
            "" if times.busy is None else f", {times.busy:.2g} processors busy with other programs"
        )
        yield "step times", f"{times.device}, {times.processes} processes, {times.measured}{busy}"
        for arm, t in times.arms.items():
            spread = "" if t.spread is None else f", spread {t.spread:.1%}"
            cpu = "" if t.cpu_ratio is None else f", of processor time {t.cpu_ratio:.3f}"
            yield f"step of {arm}", f"{seconds(t.step_s)}, ratio {t.ratio:.3f}{cpu}{spread}"
