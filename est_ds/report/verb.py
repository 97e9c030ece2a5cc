"""`est-ds plan`: its command line. Loads no torch."""

from __future__ import annotations

import argparse

from est_ds.config.arguments import above_zero, positive


def add_plan(plan: argparse.ArgumentParser) -> None:
    """Adds the options of `est-ds plan`; `report.asked` checks them."""
    plan.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="assume this many processes (default: what RUN says)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON and nothing else")
    plan.add_argument("--plot", metavar="FILE", help="draw what is kept and the FLOPs over time")
    group = plan.add_argument_group("time and money", "of the run and of its dense twin")
    group.add_argument("--gpu", metavar="NAME", help="estimate for this GPU, such as h100-80g")
    group.add_argument(
        "--count", type=positive, metavar="N", help="GPUs in all (default: the processes)"
    )
    group.add_argument(
        "--price", type=above_zero, metavar="P", help="money for an hour of one GPU, such as 2.5"
    )
    group.add_argument(
        "--layouts",
        action="store_true",
        help="compare pipe x data x ZeRO x micro-batch: which is fastest, of those that fit",
    )
    group.add_argument(
        "--measure",
        action="store_true",
        help="train some steps of every phase on this machine, and take their times",
    )
