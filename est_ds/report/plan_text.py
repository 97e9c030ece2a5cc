"""The plan of a run in tables."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from est_ds.config.published import FROM, SHA256
from est_ds.config.run_config import RunConfig
from est_ds.config.sections import AUTO
from est_ds.config.start import Start
from est_ds.cost.gpus import Gpu
from est_ds.cost.pipe_cuts import bubble, imbalance, pipe_stage_costs
from est_ds.cost.time import reduced_share
from est_ds.errors import UserError, amount
from est_ds.plans.methods.base import SAVES_NOTHING
from est_ds.plans.methods.stacking import Stacking, g_stack_tokens
from est_ds.plans.methods.token_drop import TokenDrop
from est_ds.report.asked import NOTHING, Asked
from est_ds.report.estimate import Estimate, make_estimate
from est_ds.report.plan_memory import largest_micro, memory_of, memory_on, memory_table, when
from est_ds.report.plan_time import time_and_layouts
from est_ds.report.text import PLAIN, facts_table, gibibytes, rendered

REPLICA_FACTORS = (1, 2, 4, 8)
AUTO_NOTE = "; batch.micro=auto: est-ds train takes the most that fit, the figures are for {}"


def plan_tables(estimate: Estimate, gpu: Gpu | None = None) -> str:
    """A plan for the eye, at most 80 columns where names are short.

    Args:
        gpu: that memory is estimated for; None: see `memory_of`.

    Raises:
        UserError: the batch does not fit the processes.
    """
    config = estimate.design.config
    head = f"{config.run_dir}: method {config.method['name']}, {config.steps:,} steps"
    return rendered(
        head,
        facts_table(_facts(estimate, gpu)),
        _phases(estimate),
        _layouts(estimate, gpu),
        _NOTE,
    )


_NOTE = (
    "Kept: means over the phase; heads and columns of one kept layer. FLOPs: ratios\n"
    "to a step of the full model; model: all matrix products, blocks: projections\n"
    "and MLP in the layers. Memory: the most that tensors take of a process at a\n"
    "time, with these and more processes; buckets: of communication, and what ZeRO 3\n"
    "has gathered. The allocator's slack, CUDA and NCCL come on top (a tenth)."
)


def _facts(estimate: Estimate, gpu: Gpu | None) -> list[tuple[str, str]]:
    config, shape = estimate.design.config, estimate.design.method.shape
    tokens = config.tokens_per_step
    fractions, unchecked = estimate.json["saved"], estimate.unchecked
    dense = config.steps * estimate.dense_step_flops
    cost = dense * (1.0 - fractions["model"])
    processes, accumulation = layouts(config)[0]
    pipe, replicas = config.parallel.pipe, config.data_parallel(processes)
    memory = memory_of(estimate.design, processes, gpu)
    auto = AUTO_NOTE.format(config.batch.micro) if estimate.is_auto else ""
    assumed = "" if config.parallel.processes else "; one replica is assumed"
    return [
        ("model", f"{shape.family}, {estimate.json['parameters']:,} parameters"),
        (
            "tokens",
            f"{config.steps * tokens:,} = {config.steps:,} steps x {config.batch.global_:,} "
            f"sequences x {config.data.sequence:,}{_rounded(config)}",
        ),
        *([("begins", _begins(config.start))] if config.start else []),
        *([("weights", _weights(config.model))] if FROM in config.model else []),
        ("model FLOPs", f"{cost:.3e} in all; dense training takes {dense:.3e}"),
        ("FLOPs saved", ", ".join(_saving(name, f) for name, f in fractions.items())),
        *_stacking(estimate),
        *_positions(estimate),
        ("batch", config.batch.equation(replicas) + auto),
        (
            "processes",
            f"{processes} = {pipe} pipe stage{'s' * (pipe > 1)} x {replicas} "
            f"replica{'s' * (replicas > 1)}, ZeRO {config.parallel.zero}, "
            f"{config.precision}{assumed}",
        ),
        *([("pipeline", _pipeline(estimate, accumulation))] if pipe > 1 else []),
        ("memory", f"{gibibytes(memory.total_bytes)} of tensors at most ({when(memory)})"),
        *([("dropout", _dropout(estimate))] if estimate.design.dropout else []),
        *([("draw", _draw(estimate))] if estimate.design.method.by_micro_batch else []),
        *([("masked", SAVES_NOTHING)] if estimate.design.method.masked else []),
        *([("not checked", "not here: " + ", ".join(unchecked))] if unchecked else []),
    ]


def _rounded(config: RunConfig) -> str:
    """That a run reads more than it was asked to, which need not be whole steps."""
    asked, read = config.tokens, config.tokens_after(config.steps)
    return f"; tokens={asked:,} rounded up to whole steps" if asked and asked < read else ""


def _begins(start: Start) -> str:
    return (
        f"at step {start.step:,}, {start.tokens:,} tokens behind it, with a checkpoint of another "
        f"run (parent.yaml); all figures here are of the whole schedule, from step 0"
    )


def _weights(section: dict[str, Any]) -> str:
    return f"of {section[FROM]} (sha256 {section[SHA256][:12]}...)"


def _stacking(estimate: Estimate) -> list[tuple[str, str]]:
    """When the depth grows, beside G_stack's rule; nothing of a method that the rule is not of."""
    config, method = estimate.design.config, estimate.design.method
    if not (isinstance(method, Stacking) and method.follows_g_stack):
        return []
    dense = config.steps * estimate.dense_step_flops
    ruled = g_stack_tokens(estimate.json["parameters"], dense) / config.tokens_per_step
    now = method.phases[0].until_step
    found = [
        f"{amount(steps * config.tokens_per_step)} tokens ("
        + (
            f"step {round(steps):,}, {steps / config.steps:.3f} of the run)"
            if steps < config.steps
            else "never in this run: the rule is of models and runs far larger)"
        )
        for steps in (now, ruled)
    ]
    return [("stacked", f"after {found[0]}; by G_stack's rule after {found[1]}")]


def _positions(estimate: Estimate) -> list[tuple[str, str]]:
    """How many positions pass through the layers that `token_drop` has them skip."""
    method = estimate.design.method
    if not isinstance(method, TokenDrop):
        return []
    first, end = method.dropping[0], method.dropping[-1]
    total, until = method.shape.sequence, method.phases[0].until_step
    return [
        (
            "positions",
            f"layers {first} to {end} keep {method.kept(0):,} of {total:,} at first, on average "
            f"{method.mean_loads(0)[first].positions:.1%}, and all after {until:,} steps",
        )
    ]


def _pipeline(estimate: Estimate, accumulation: int) -> str:
    """The layers of the pipe stages, and how well they share the work of every phase."""
    design = estimate.design
    method, cuts = design.method, design.cuts
    stages = " | ".join(f"{a}-{b - 1}" for a, b in zip([0, *cuts], cuts))
    size = design.flops_size(1)
    loads = ", ".join(
        f"{phase.name} {imbalance(pipe_stage_costs(method, i, cuts, **size)):.2f}"
        for i, phase in enumerate(method.phases)
    )
    waits = bubble(len(cuts), accumulation)
    return f"layers {stages}; slowest stage over mean: {loads}; bubble {waits:.2f}"


def _dropout(estimate: Estimate) -> str:
    """What drops in training, said by the run file or not."""
    design = estimate.design
    chances = ", ".join(f"{field} {chance}" for field, chance in design.dropout.items())
    unsaid = [field for field in design.dropout if field not in design.config.model]
    return chances + (f" (Hugging Face's defaults: {', '.join(unsaid)})" if unsaid else "")


def _draw(estimate: Estimate) -> str:
    """What it costs that every micro-batch has its own plan."""
    design = estimate.design
    method, count = design.method, design.config.batch.micro_batches

    def sent(phase: int, plans: int) -> str:
        return f"{reduced_share(design.config, method, phase, plans):.2f}"

    shares = ", ".join(
        f"{phase.name} {sent(i, count)} ({sent(i, 1)})" for i, phase in enumerate(method.phases)
    )
    return (
        f"micro_batch: {count} plans a step, FLOPs as with draw: step; layers' gradients that a "
        f"step reduces, of all (with draw: step): {shares}"
    )


def _phases(estimate: Estimate) -> Table:
    config, dense = estimate.design.config, estimate.dense
    tokens = config.tokens_per_step
    table = Table(box=PLAIN, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("phase", vertical="bottom", overflow="fold")
    heads = estimate.design.method.shape.has_attention
    for name in (
        "steps",
        "tokens",
        f"layers\nof {short(dense.layers)}",
        *([f"heads\nof {short(dense.heads)}"] if heads else []),
        f"columns\nof {short(dense.columns)}",
        "model\nFLOPs",
        "blocks\nFLOPs",
    ):
        table.add_column(name, justify="right", no_wrap=name == "steps", overflow="fold")
    for phase in estimate.json["phases"]:
        first, end = phase["from_step"], phase["until_step"]
        table.add_row(
            phase["name"],
            f"{first + 1:,}-{end:,}",
            amount((end - first) * tokens),
            short(phase["kept_layers"]),
            *([short(phase["kept_heads"])] if heads else []),
            short(phase["kept_columns"]),
            f"{phase['model_ratio']:.3f}",
            f"{phase['blocks_ratio']:.3f}",
        )
    return table


def _layouts(estimate: Estimate, gpu: Gpu | None) -> Table:
    """Memory of a process with the processes of the run file, and with more replicas."""
    config = estimate.design.config
    offload = config.parallel.offload  # then there is one process a replica
    head = ["pro-\ncesses", *([] if offload else ["repli-\ncas"]), "accu-\nmula-\ntion"]
    rows = []
    for processes, accumulation in layouts(config):
        replicas = [] if offload else [f"{config.data_parallel(processes)}"]
        row = [f"{processes}", *replicas, f"{accumulation}"]
        rows.append((row, memory_of(estimate.design, processes, gpu)))
    return memory_table(head, rows)


def layouts(config: RunConfig) -> list[tuple[int, int]]:
    """(processes, accumulation): as the run file says, then with 2, 4 and 8 times the replicas.

    Without `parallel.processes` one replica is assumed. Numbers of replicas by which the batch
    does not divide are left out, but for the first.

    Raises:
        UserError: the batch does not fit the processes of the run file.
    """
    first = config.parallel.processes or config.parallel.pipe
    found = []
    for factor in REPLICA_FACTORS:
        processes = factor * first
        try:
            found.append((processes, config.batch.accumulation(config.data_parallel(processes))))
        except UserError:
            if factor == 1:
                raise
    return found


def short(count: float) -> str:
    """A mean count: whole where it is whole, else with one or two decimals."""
    return f"{count:,.0f}" if count == round(count) else f"{count:,.2f}".rstrip("0")


def _saving(name: str, fraction: float) -> str:
    """For example `26.67% blocks (1.364x)`: dense FLOPs are that many times the run's."""
    return f"{fraction:.2%} {name} ({1 / (1 - fraction):.3f}x)"


def plan_report(
    config: RunConfig, as_json: bool, plot: str | None = None, asked: Asked = NOTHING
) -> str:
    """The plan of a run as a table, or as the JSON document of `est-ds plan --json`.

    Every phase has `kept_layers` (of the model), `kept_heads` and `kept_columns` (of one kept
    layer), all as means over the phase's steps, and its FLOPs as ratios of the dense ones.
    `saved` is the fraction of the dense FLOPs of the whole run that is saved. With
    `batch.micro: auto` the figures are for the largest micro-batch that fits `asked.gpu`, or for 1.

    Args:
        plot: file to draw it into; its ending is one that matplotlib knows (.png, .svg, .pdf).
        asked: what else to show.

    Raises:
        UserError: the run file's model, method, schedule, layout or data do not fit together, or
            the file cannot be written.
    """
    layouts(config)  # the batch must fit the processes, whether a table shows it or not
    estimate, gpu = make_estimate(config), asked.gpu
    if estimate.is_auto and gpu:
        estimate = _with_largest_micro(estimate, gpu)
    if as_json and estimate.unchecked:
        print(
            f"est-ds: not checked, since not here: {', '.join(estimate.unchecked)}", file=sys.stderr
        )
    design, is_auto = estimate.design, estimate.is_auto
    more, blocks = time_and_layouts(design, estimate.json["parameters"], asked, is_auto)
    if gpu:
        more["memory"], block = memory_on(design, gpu, is_auto)
        blocks = [block, *blocks]
    if is_auto:
        more |= {"micro": AUTO, "figures_for_micro": design.config.batch.micro}
    if as_json:
        text = json.dumps(estimate.json | more, indent=2)
    else:
        text = "\n".join([plan_tables(estimate, gpu), *blocks])
    if plot is not None:
        from est_ds.report.plan_figure import write_plan_figure  # matplotlib takes its time

        write_plan_figure(estimate, Path(plot))
    return text


def _with_largest_micro(estimate: Estimate, gpu: Gpu) -> Estimate:
    """The figures for the largest micro-batch that fits; as they are if none does."""
    design = estimate.design
    largest = largest_micro(design, gpu, is_auto=True)
    if largest is None:
        return estimate
    return replace(estimate, design=replace(design, config=design.config.with_micro(largest.micro)))
