"""Tasks of lm-eval (EleutherAI's harness), the library itself, on an exported model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from est_ds.errors import UserError, did_you_mean, error_line, how_to_install
from est_ds.run.scores import Figure, TaskScore
from est_ds.score.words import TASKS as OWN

_RESAMPLES = 1000  # for standard errors that have no formula


@dataclass(frozen=True)
class Asked:
    """What is asked of lm-eval.

    Attributes:
        names: of its tasks, groups or tags, or paths of their YAML files.
        include: folder with more of them.
        limit: examples of each task; None: all.
        shots: examples shown before each; None: as the task says.
    """

    names: tuple[str, ...]
    include: Path | None = None
    limit: int | None = None
    shots: int | None = None


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, as lm-eval has loaded them."""

    asked: Asked
    manager: Any
    loaded: tuple[Any, ...]


def load_tasks(asked: Asked) -> Tasks:
    """Finds tasks and reads their data; no model is needed.

    Raises:
        UserError: lm-eval is not installed, there is no such task, or its file or its data cannot
            be read.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise UserError(
            f"--tasks={','.join(asked.names)} needs lm-eval ({e}); "
            f"{did_you_mean(asked.names[0], OWN)}install it with {how_to_install('eval')}, or use "
            f"est-ds' own tasks, {' and '.join(OWN)}."
        ) from None
    if asked.include is not None and not asked.include.is_dir():
        raise UserError(f"--include={str(asked.include)!r} is no folder; give one with YAML files.")
    include = None if asked.include is None else str(asked.include)
    with _quiet():
        manager = TaskManager(include_path=include, include_defaults=False)
        if not all(name in manager.all_tasks or _is_path(name) for name in asked.names):
            manager = TaskManager(include_path=include)  # reads thousands of files
        loaded = tuple(part for name in asked.names for part in _loaded(manager, name))
    return Tasks(asked, manager, loaded)


def harness_scores(
    tasks: Tasks, model: nn.Module, tokenizer: Any, batch: int
) -> dict[str, TaskScore]:
    """Returns what a causal model scores, by the name of the task or group.

    Args:
        model: on the device to use.
        batch: requests at once.

    Raises:
        UserError: a task does not fit its own data.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    asked = tasks.asked
    with _quiet():
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch,
            softmax_dtype=torch.float32,
        )
        try:
            found = simple_evaluate(
                model=lm,
                tasks=list(tasks.loaded),
                task_manager=tasks.manager,
                num_fewshot=asked.shots,
                limit=asked.limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
            )
        except (RuntimeError, MemoryError):  # of the model or the machine
            raise
        except Exception as e:  # whatever the library raises for a task that does not fit its data
            raise UserError(
                f"--tasks={','.join(asked.names)}: lm-eval cannot ask it ({error_line(e)}); the "
                f"task's file does not fit its data: correct it, or leave the task out."
            ) from None
    assert found is not None, "one process computes, and has the results"
    names = found["results"]
    return {name: _score(name, found, asked) for name in names}


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _loaded(manager: Any, name: str) -> list[Any]:
    """A task or group, or the tasks of a tag."""
    if _is_path(name):
        if not Path(name).is_file():
            raise UserError(f"--tasks: {name!r} does not exist; give the path of a task's file.")
    elif name not in manager.all_tasks:
        raise UserError(
            f"--tasks: {name!r:.60} is no task of est-ds ({', '.join(OWN)}) nor of lm-eval; "
            f"{did_you_mean(name, [*OWN, *manager.all_tasks])}give a name of "
            f"lm-eval's list (lm_eval ls tasks), a task's YAML file, or --include=FOLDER."
        )
    try:
        found = manager.load([name])
    except Exception as e:  # whatever the libraries raise for a file or data that they cannot read
        # What lm-eval comes to when it looks at the first example.
        is_empty = isinstance(e, StopIteration)
        why = "its data have no example" if is_empty else error_line(e)
        raise UserError(
            f"--tasks: {name!r} cannot be loaded ({why}); a task's file is YAML as "
            f"lm-eval has it (task, output_type, doc_to_text, ...), and where there is no network "
            f"its data are files (dataset_path: json, dataset_kwargs: data_files)."
        ) from None
    groups = found.get("groups", {})
    inner = {child for children in found.get("group_map", {}).values() for child in children}
    outer = [group for name, group in groups.items() if name not in inner]
    return outer or list(found["tasks"].values())


def _score(name: str, found: dict[str, Any], asked: Asked) -> TaskScore:
    figures, values = {}, found["results"][name]
    for key, value in values.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, bool | str):
            continue
        shown = metric if filter_ == "none" else f"{metric} ({filter_})"
        error = _number(values.get(f"{metric}_stderr,{filter_}"))
        figures[shown] = Figure(value=_number(value), error=error)
    examples = found.get("n-samples", {}).get(name, {}).get("effective")
    settings = {"version": found["versions"].get(name), "shots": found["n-shot"].get(name)}
    settings |= {"limit": asked.limit}
    by = f"lm_eval {version('lm_eval')}"
    return TaskScore(by=by, metrics=figures, examples=examples, settings=settings)


def _number(value: Any) -> float | None:
    """A figure of lm-eval, which says "N/A" of what it does not know."""
    known = None if isinstance(value, str) or value is None else float(value)
    return known if known is not None and math.isfinite(known) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of datasets, and with the libraries' errors alone."""
    import datasets
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bar()
    # Git says on standard error that the working directory is no repository.
    commit, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = commit
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bar()
