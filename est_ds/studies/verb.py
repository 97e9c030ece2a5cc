"""`est-ds compare` and `est-ds analyse dropout`: what may be asked, and what is called. Loads no
library until then."""

from __future__ import annotations

import argparse
import sys

from est_ds.analysis.verb import Name, give
from est_ds.config.arguments import positive


def add_compare(study: argparse.ArgumentParser) -> None:
    """Adds the options of `est-ds compare`."""
    study.description = (
        "Trains the runs of a study that are not done, and compares its arms with the baseline at "
        "equal tokens, FLOPs and seconds. Started again, it goes on. Exit code 0: done, 1: a run "
        "failed."
    )
    study.set_defaults(verb=_compare, parser=study)
    study.add_argument("study", metavar="STUDY", help="a study file (YAML)")
    study.add_argument("--json", action="store_true", help="print JSON and nothing else")
    nothing = study.add_mutually_exclusive_group()
    nothing.add_argument(
        "--dry-run", action="store_true", help="say what would be trained, and train nothing"
    )
    nothing.add_argument(
        "--time-only",
        action="store_true",
        help="measure the step times of all arms in turns with the baseline's, and train nothing",
    )
    nothing.add_argument(
        "--answer-only", action="store_true", help="answer from what is done, and train nothing"
    )
    study.add_argument("--plot", metavar="FILE", help="also draw the answer into a picture")
    study.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="train this many runs beside each other (default: as cores or GPUs allow)",
    )
    study.add_argument("--only", metavar="ARM", help="train this arm and the baseline alone")
    study.add_argument(
        "--add-seeds",
        type=positive,
        default=0,
        metavar="N",
        help="train N seeds beyond those of the file; they then belong to the study's results",
    )


def _compare(parsed: argparse.Namespace, arguments: list[str]) -> None:
    """Runs `est-ds compare`."""
    from est_ds.errors import UserError
    from est_ds.studies.compare import Wish, compare

    if parsed.plot and parsed.dry_run:
        raise UserError("--plot has no effect with --dry-run; use --answer-only.")
    wish = Wish(
        jobs=parsed.jobs,
        only=parsed.only,
        add_seeds=parsed.add_seeds,
        json=parsed.json,
        dry_run=parsed.dry_run,
        time_only=parsed.time_only,
        answer_only=parsed.answer_only,
        plot=parsed.plot,
    )
    sys.exit(compare(parsed.study, wish))


DROPOUT = (
    "Asks whether a subnetwork step is structural dropout. Says how the arms of STUDY compare, and "
    "measures at the same weights and batches what every arm draws: the mean and the variance of "
    "the full model's gradient over the draws, and the loss of the subnetworks less that of the "
    "full model. Holds 20 vectors of the parameters, and one for every batch."
)


def add_dropout(name: Name) -> None:
    """Adds `est-ds analyse dropout`, which is about a study."""
    dropout = name("dropout", _dropout, "is a subnetwork step structural dropout: a study", DROPOUT)
    dropout.add_argument("study", metavar="STUDY", help="a study file (YAML)")
    dropout.add_argument(
        "--run",
        metavar="RUN",
        help="measure at the weights of this run (default: the baseline's, with the first seed)",
    )
    dropout.add_argument(
        "--step",
        metavar="S",
        help="a step with a checkpoint, latest, or first for the weights that the run begins with "
        "(default: latest, or first without any checkpoint)",
    )
    dropout.add_argument(
        "--draws",
        type=positive,
        default=32,
        metavar="N",
        help="draws of every phase (default: 32)",
    )
    dropout.add_argument(
        "--batches",
        type=positive,
        default=2,
        metavar="N",
        help="global batches of training on which they are made (default: 2)",
    )


def _dropout(parsed: argparse.Namespace, arguments: list[str]) -> None:
    """Runs `est-ds analyse dropout`."""
    from transformers.utils import logging

    from est_ds.analysis.dropout import Effort
    from est_ds.studies.dropout import At, measure_dropout
    from est_ds.studies.dropout_result import dropout_result

    logging.set_verbosity_error()
    at = At(parsed.run, parsed.step)
    numbers, folder = measure_dropout(parsed.study, at, Effort(parsed.draws, parsed.batches))
    give(dropout_result(numbers), folder, parsed)
