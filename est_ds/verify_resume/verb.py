"""`est-ds verify-resume`: its command line. Loads no torch before the verb runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from est_ds.config.arguments import positive


def add_verify_resume(check: argparse.ArgumentParser) -> None:
    """Adds the options of `est-ds verify-resume`."""
    check.description = (
        "Trains a short version of RUN on this machine, kills it, resumes it, and compares every "
        "step, weight and moment with the same run uninterrupted. Reads only the config of RUN. "
        "Exit code 0: PASS, 1: a difference."
    )
    check.add_argument(
        "--steps", type=positive, metavar="K", help="train this many steps (default: 12 or more)"
    )
    check.add_argument(
        "--at", type=positive, metavar="S", help="resume after step S (default: near the middle)"
    )
    check.add_argument(
        "--processes", type=positive, metavar="N", help="start this many (default: as train)"
    )
    check.add_argument(
        "--then",
        default="",
        metavar="OVERRIDES",
        help="resume in another layout: 'parallel.pipe=1 parallel.zero=3' (default: the same)",
    )
    check.add_argument(
        "--then-processes",
        type=positive,
        metavar="N",
        help="resume with this many (default: --processes)",
    )
    check.add_argument("--keep", type=Path, metavar="DIR", help="keep both runs in this folder")


def run_verify_resume(parsed: argparse.Namespace, arguments: list[str]) -> None:
    """Runs it, and exits."""
    from est_ds.verify_resume.verify import Wanted, verify_resume

    wanted = Wanted(
        steps=parsed.steps,
        cut=parsed.at,
        processes=parsed.processes,
        then_processes=parsed.then_processes,
        keep=parsed.keep,
    )
    found = verify_resume(parsed.run, parsed.overrides, parsed.then.split(), wanted)
    print(found)
    sys.exit(1 if found.first else 0)
