"""What `est-ds plan` adds where hours are asked for: time, money, layouts."""

from __future__ import annotations

from typing import Any

from est_ds.cost.time import estimated
from est_ds.design import Outline
from est_ds.report.asked import Asked
from est_ds.report.hours import (
    MEASURED_NOTE,
    NOTE,
    cost_document,
    job_of,
    measured,
    time_document,
    time_facts,
    time_table,
)
from est_ds.report.layout_search import compared_layouts, layouts_document, layouts_table
from est_ds.report.text import facts_table, rendered


def time_and_layouts(
    outline: Outline, parameters: int, asked: Asked, is_auto: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Returns the parts of the document, and the same as blocks of text; nothing where nothing was
    asked.

    Args:
        parameters: of the model.
        is_auto: whether the micro-batch is still to be found.

    Raises:
        UserError: the time cannot be estimated.
    """
    gpu = asked.gpu
    if asked.times:
        time = measured(outline, asked.times)
    elif gpu:
        time = estimated(job_of(outline, gpu))
    else:
        return {}, []
    document: dict[str, Any] = {"time": time_document(time)}
    if asked.times:
        document["time"]["busy"] = asked.times.is_busy
    if asked.price:
        document["cost"] = cost_document(time, asked.price)
    head = f"{time.processes} x {time.device}"
    note = MEASURED_NOTE if asked.times else NOTE
    facts = facts_table(time_facts(time, parameters, asked))
    blocks = [rendered(head, facts, time_table(time, outline.config.tokens_per_step), note)]
    if asked.layouts and gpu:
        layouts = compared_layouts(outline, gpu, is_auto)
        document["layouts"] = layouts_document(layouts, gpu)
        blocks.append(rendered(f"layouts of {head}", *layouts_table(layouts, gpu)))
    return document, blocks
