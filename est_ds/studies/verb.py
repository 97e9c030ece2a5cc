"""`est-ds compare`: what may be asked, and what is called. Loads no library until then."""

from __future__ import annotations

import argparse
import sys

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
