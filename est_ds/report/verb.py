"""`est-ds plan` and `est-ds report`: their command lines. Load no torch."""

from __future__ import annotations

import argparse

from est_ds.config.arguments import above_zero, positive
from est_ds.errors import UserError


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


def add_report(report: argparse.ArgumentParser) -> None:
    """Adds the options of `est-ds report`."""
    report.description = (
        "Draws the page of a run directory, tables and plots, as report.html in it. Of several it "
        "draws one page with their curves over tokens, FLOPs and seconds."
    )
    report.set_defaults(verb=_report, parser=report)
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run directory")
    report.add_argument(
        "--out", metavar="FILE", help="write the page of several runs there (default: report.html)"
    )


def _report(parsed: argparse.Namespace, arguments: list[str]) -> None:
    """Runs `est-ds report`."""
    from est_ds.report.page import write_report

    if len(parsed.runs) > 1:
        from est_ds.report.several import write_several

        print(f"the report is {write_several(parsed.runs, parsed.out or 'report.html')}")
        return
    [run] = parsed.runs
    if parsed.out is not None:
        raise UserError(
            f"--out={parsed.out} has no effect on a single run, whose page is report.html in its "
            f"directory; remove it, or give several runs."
        )
    print(f"the report is {write_report(run)}")
