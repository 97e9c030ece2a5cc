"""`est-ds eval` and `est-ds finetune`: their command lines. Loads no torch before a verb runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from est_ds.config.arguments import above_zero, natural, positive, seed, several
from est_ds.ranks.preempt import leaving_on_signals

_OWN = "next_word and cloze are made of the held-out text"


def add_eval(sub: argparse.ArgumentParser) -> None:
    """Adds the options of `est-ds eval`."""
    sub.description = (
        "Computes what a checkpoint scores, with its exported model in plain transformers: the "
        "held-out loss of every corpus, and tasks. Writes eval.json in the run directory."
    )
    _checkpoint(sub)
    sub.add_argument(
        "--tasks",
        metavar="A,B",
        help=f"tasks: {_OWN}, every other one is lm-eval's: its name, or its YAML file",
    )
    sub.add_argument("--include", type=Path, metavar="DIR", help="a folder with tasks of lm-eval")
    sub.add_argument("--limit", type=positive, metavar="N", help="examples of each task, at most")
    sub.add_argument(
        "--shots",
        type=natural,
        metavar="N",
        help="let lm-eval show N examples before each (default: as the task says)",
    )
    _json(sub)


def add_finetune(sub: argparse.ArgumentParser) -> None:
    """Adds the options of `est-ds finetune`."""
    sub.description = (
        "Trains a classification head on the exported model of a checkpoint, as GLUE does it, with "
        "every learning rate and seed. Writes finetune.json in the run directory."
    )
    sub.add_argument(
        "--task",
        required=True,
        metavar="PATH",
        help="a folder with train.tsv and dev.tsv (or .jsonl) as GLUE's, or a training file; or "
        "order (are two sentences in order?), source (which held-out corpus is it from?)",
    )
    _checkpoint(sub)
    sub.add_argument(
        "--lr",
        type=several(above_zero),
        default=(2e-5, 5e-5, 1e-4),
        metavar="A,B",
        help="learning rates (default: 2e-5,5e-5,1e-4)",
    )
    sub.add_argument(
        "--seeds",
        type=several(seed),
        default=(0, 1, 2),
        metavar="A,B",
        help="seeds of the head's weights and the order of the examples (default: 0,1,2)",
    )
    sub.add_argument("--epochs", type=above_zero, default=3.0, metavar="N", help="default: 3")
    sub.add_argument(
        "--batch", type=positive, default=32, metavar="N", help="examples a step (default: 32)"
    )
    sub.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="cut an example to N tokens (default: 128, or what a smaller model takes)",
    )
    sub.add_argument(
        "--limit", type=positive, metavar="N", help="use the first N examples of each set only"
    )
    _json(sub)


def run_eval(parsed: argparse.Namespace, arguments: list[str]) -> None:
    """Runs `est-ds eval`."""
    from est_ds.config.run_file import load_run
    from est_ds.report.score_tables import (
        ERRORS,
        HELD_OUT_HEADS,
        TASK_HEADS,
        held_out_rows,
        plain_table,
        task_rows,
    )
    from est_ds.run.scores import EVALUATIONS
    from est_ds.score.evaluate import Wish, evaluate_run

    config = load_run(parsed.run, parsed.overrides)
    tasks = _names(parsed.tasks)
    wish = Wish(parsed.checkpoint, tasks, parsed.include, parsed.limit, parsed.shots)
    with leaving_on_signals():
        found, where = evaluate_run(config, wish)
    if parsed.json:
        print(found.model_dump_json(indent=1))
        return
    print(f"step {found.step} of {config.run_dir} (model: {where})")
    print(plain_table(HELD_OUT_HEADS, held_out_rows([found])))
    for name, loss in found.held_out.items():
        if loss.reported is not None:
            print(f"{name}: the run reported {loss.reported:.4f} nats of the same windows")
    if found.tasks:
        print(plain_table(TASK_HEADS, task_rows([found])))
    print(f"{ERRORS} Written to {Path(config.run_dir, EVALUATIONS)}.")


def _names(tasks: str | None) -> tuple[str, ...]:
    """The tasks that `--tasks` names, none twice.

    Raises:
        UserError: it names none.
    """
    from est_ds.errors import UserError

    names = tuple(dict.fromkeys(name for name in (tasks or "").split(",") if name))
    if tasks is not None and not names:
        raise UserError(
            f"--tasks={tasks!r} names no task; name some, such as next_word,cloze, or leave it out."
        )
    return names


def run_finetune(parsed: argparse.Namespace, arguments: list[str]) -> None:
    """Runs `est-ds finetune`."""
    from est_ds.config.run_file import load_run
    from est_ds.report.score_tables import SPREAD, TUNING_HEADS, plain_table, tuning_rows
    from est_ds.run.scores import FINE_TUNINGS
    from est_ds.score.finetune import Wish, finetune_run

    config = load_run(parsed.run, parsed.overrides)
    wish = Wish(
        task=parsed.task,
        checkpoint=parsed.checkpoint,
        lrs=parsed.lr,
        seeds=parsed.seeds,
        epochs=parsed.epochs,
        batch=parsed.batch,
        tokens=parsed.tokens,
        limit=parsed.limit,
    )
    with leaving_on_signals():
        found, where = finetune_run(config, wish)
    if parsed.json:
        print(found.model_dump_json(indent=1))
        return
    train, dev = found.examples
    print(f"step {found.step} of {config.run_dir} (model: {where})")
    print(f"{found.task}: {train:,} training examples, {dev:,} development examples")
    print(plain_table(TUNING_HEADS, tuning_rows([found])))
    print(f"{SPREAD} Written to {Path(config.run_dir, FINE_TUNINGS)}.")


def _checkpoint(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--checkpoint", default="latest", help="take latest (default), best, or a number of steps"
    )


def _json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print JSON and nothing else")
