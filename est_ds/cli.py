"""`est-ds VERB`: exit code 0 done, 2 the input is wrong, 1 a failure (3: one that would recur)."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import est_ds
from est_ds.analysis.verb import SUMMARY, add_analyse
from est_ds.config.arguments import natural, positive
from est_ds.errors import Diverged, Failure, UserError
from est_ds.ranks import preempt
from est_ds.ranks.world import PORT, World, end_with_starter, launched, meeting_place, say
from est_ds.reference.verb import add_fields
from est_ds.report.verb import add_plan, add_report
from est_ds.score.verbs import add_eval, add_finetune, run_eval, run_finetune
from est_ds.studies.verb import add_compare, add_dropout
from est_ds.verify_resume.verb import add_verify_resume, run_verify_resume

if TYPE_CHECKING:
    from est_ds.config.run_config import RunConfig


# No fault of the program, whatever it was about to write.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def main(arguments: list[str] | None = None) -> None:
    """Runs a verb and exits."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        parsed = _parse(arguments)
        parsed.verb(parsed, arguments)
    except UserError as e:
        _complain("error", e)
        _leave(2)
    except Failure as e:
        _complain("failed", e)
        _leave(3 if isinstance(e, Diverged) else 1)
    except BrokenPipeError:  # `est-ds plan RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        if e.errno not in OF_THE_DISK:
            raise
        _complain("failed", e)
        _leave(1)


def _leave(code: int) -> NoReturn:
    """Ends this process; inside a launcher at once, see `engine.start.leave_processes`."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _complain(kind: str, error: Exception) -> None:
    """Once on every host: what is wrong may be wrong on one of them only."""
    try:
        world = World.from_environment()
    except UserError:  # nobody knows which process this is
        world = World(0, 1, 0)
    if world.is_first or world.local_rank == 0:
        host = "" if world.is_first else f"{socket.gethostname()}: "
        print(f"est-ds: {kind}: {host}{error}", file=sys.stderr, flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parses a command line, on which overrides may also follow options."""
    parser = _parser()
    parsed, unknown = parser.parse_known_args(arguments)
    overrides = [word for word in unknown if "=" in word and not word.startswith("-")]
    if len(overrides) < len(unknown) or (overrides and not hasattr(parsed, "overrides")):
        # Not `parser.error`, which would show how est-ds is used, and not its verb.
        parsed.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if overrides:
        parsed.overrides = parsed.overrides + overrides
    if getattr(parsed, "overrides", None):
        from est_ds.config.run_file import in_effect

        parsed.overrides = in_effect(parsed.overrides)
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="est-ds", description="Evolving-subnetwork pretraining on DeepSpeed."
    )
    parser.add_argument("--version", action="version", version=est_ds.__version__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name, function, help, overrides=True):
        sub = verbs.add_parser(name, help=help, description=help)
        sub.add_argument("run", metavar="RUN", help="a run file (YAML) or a run directory")
        sub.set_defaults(verb=function, parser=sub)
        if overrides:
            sub.add_argument(
                "overrides",
                nargs="*",
                default=[],
                metavar="section.field=value",
                help="change a field of RUN",
            )
        return sub

    add_plan(verb("plan", _plan, "show phases, FLOPs, memory and time of a run before it begins"))
    _add_train(verb("train", _train, "train a run, or resume it from its latest checkpoint"))
    _add_branch(verb("branch", _branch, "begin a new run with a checkpoint of another one"))
    add_verify_resume(
        verb("verify-resume", run_verify_resume, "prove that a killed run resumes exactly")
    )
    _add_export(verb("export", _export, "write a checkpoint as a Hugging Face folder"))
    add_eval(verb("eval", run_eval, "score a checkpoint: held-out losses, bits per byte, tasks"))
    add_finetune(verb("finetune", run_finetune, "train a classifier on a checkpoint, as GLUE does"))
    doctor = verbs.add_parser("doctor", help="check nodes before a run is started on them")
    _add_doctor(doctor)
    add_compare(verbs.add_parser("compare", help="find out which methods pay: a study of runs"))
    add_dropout(add_analyse(verbs.add_parser("analyse", help=SUMMARY)))
    add_report(verbs.add_parser("report", help="draw the page of a run, or of several together"))
    add_fields(
        verbs.add_parser("fields", help="print what every field of a run or study file means")
    )
    return parser


def _add_train(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="start this many on this machine (default: one per GPU; without a GPU what RUN says)",
    )
    train.add_argument(
        "--restarts",
        type=natural,
        default=0,
        metavar="N",
        help="start a failed run again, up to N times without a new checkpoint in between "
        "(default: 0); with --hostfile on the hosts that answer, else on the same nodes",
    )
    _many_nodes(train)
    # The deepspeed launcher adds it unless told not to; LOCAL_RANK says the same.
    train.add_argument("--local_rank", help=argparse.SUPPRESS)
    # Names the processes of one start; launch/ finds them by it.
    train.add_argument("--start", help=argparse.SUPPRESS)


def _add_branch(branch: argparse.ArgumentParser) -> None:
    branch.description = (
        "Makes the directory of a new run that begins with a checkpoint of RUN: another schedule, "
        "more steps, another method or other data from there. Trains nothing: est-ds train NEW "
        "does."
    )
    branch.add_argument(
        "--at", required=True, metavar="STEP", help="a step with a checkpoint, latest or best"
    )
    branch.add_argument("--run-dir", required=True, metavar="NEW", help="make this directory")


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument(
        "--checkpoint", default="latest", help="export latest (default), best, or a number of steps"
    )
    export.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write here (default: RUN_DIR/export; a smaller model: RUN_DIR/export_subnetwork)",
    )
    for name, what in (("layers", "0-5,8"), ("heads", "0,1,4"), ("columns", "0-1023")):
        export.add_argument(
            f"--{name}",
            metavar="INDICES",
            help=f"export a smaller model of these {name}, such as {what}, rescaled as in training",
        )
    export.add_argument(
        "--plan-step",
        type=natural,
        metavar="S",
        help="export the plan of step S as a smaller model",
    )
    export.add_argument(
        "--prompt", default="def ", help="begin the sample with this (default: 'def ')"
    )
    export.add_argument(
        "--skip-loss",
        action="store_true",
        help="skip the check of the held-out loss (it is long for a large model without a GPU)",
    )
    export.add_argument(
        "--push",
        metavar="NAME",
        help="then put the folder into this repository of the Hub (OWNER/NAME); one that is not "
        "there is made, and private",
    )


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.description = "Checks nodes side by side: versions, GPUs, corpus, disk, network."
    doctor.add_argument("run", metavar="RUN", nargs="?", help="a run file or a run directory")
    doctor.set_defaults(verb=_doctor, parser=doctor)
    doctor.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.field=value",
        help="change a field of RUN",
    )
    _many_nodes(doctor)
    doctor.add_argument(
        "--light",
        action="store_true",
        help="leave out the matrix product on every GPU, which slows a running training down",
    )


def _many_nodes(sub: argparse.ArgumentParser) -> None:
    """Options that say where the nodes are."""
    group = sub.add_argument_group(
        "many nodes", "reach them by ssh (--hostfile), or call this on each of them (--nodes)"
    )
    group.add_argument(
        "--hostfile", metavar="F", help="reach these hosts by ssh; a line is HOST slots=N"
    )
    group.add_argument(
        "--nodes", type=positive, metavar="N", help="join N nodes without ssh, and be one of them"
    )
    group.add_argument("--node-rank", type=natural, metavar="R", help="be this one, 0 to N-1")
    group.add_argument("--master", metavar="HOST[:PORT]", help=f"find node 0 there (port: {PORT})")


def _plan(parsed: argparse.Namespace, arguments: list[str]) -> None:
    from est_ds.config.run_file import load_run
    from est_ds.report.asked import Asked
    from est_ds.report.plan_text import plan_report

    asked = Asked.of(parsed)
    overrides = list(parsed.overrides)
    if asked.processes:
        overrides.append(f"parallel.processes={asked.processes}")
    config, times = load_run(parsed.run, overrides), None
    if asked.measures:
        if config.batch.is_auto:
            raise UserError("batch.micro=auto: --measure needs a number; add batch.micro=N.")
        from est_ds.training.time_runs import TimedRun, measure_runs

        timed = TimedRun("run", parsed.run, tuple(overrides))
        times = measure_runs([timed], asked.processes, log=sys.stderr)["run"]
    print(plan_report(config, parsed.json, parsed.plot, replace(asked, times=times)))


def _train(parsed: argparse.Namespace, arguments: list[str]) -> None:
    if launched():
        preempt.heed_signals()
        meeting_place(World.from_environment())
    else:
        preempt.end_on_signals()
    from est_ds.config.run_file import load_run
    from est_ds.run.tracker_kinds import check_trackers

    config = load_run(parsed.run, parsed.overrides)
    check_trackers(config)
    end_with_starter()  # the launcher, or a study
    if launched():
        _train_here(parsed, config)
    from est_ds.checkpoints.store import Store
    from est_ds.launch.placement import where_to
    from est_ds.launch.retries import train_again_until_done
    from est_ds.run.directory import lock_run_dir
    from est_ds.run.prepare import check_run

    where, overrides = where_to(config, parsed), list(parsed.overrides)
    if config.batch.is_auto:
        from est_ds.training.micro_batch import find_micro

        check_run(config.with_micro(1), where.processes)  # before a trial takes its time
        overrides.append(f"batch.micro={find_micro(parsed.run, overrides, where)}")
        config = load_run(parsed.run, overrides)
    checkpoints = Store.of(check_run(config, where.processes))
    if checkpoints.latest == config.steps:
        print(f"{config.run_dir} is done: all {config.steps} steps are behind it.")
        if where.is_first:
            _summary(config.run_dir)
        return
    if where.is_first:
        lock_run_dir(config).close()
    # Without the options that say where: DeepSpeed's launcher would take some as its own.
    arguments = ["train", parsed.run, *overrides]
    sys.exit(train_again_until_done(arguments, where, config, parsed.restarts))


def _train_here(parsed: argparse.Namespace, config: RunConfig) -> NoReturn:
    """Trains in this process, which a launcher has started."""
    if parsed.restarts:
        raise UserError(
            f"--restarts={parsed.restarts} inside a launcher (RANK is set) has no effect: the "
            f"launcher starts the processes. Remove it and let the launcher start them again, "
            f"or call est-ds train without a launcher."
        )
    from est_ds.engine.start import leave_processes
    from est_ds.run.prepare import prepare
    from est_ds.training.loop import train

    world = World.from_environment()
    try:
        train(prepare(config, world.size), world)
    except preempt.Preempted as e:
        say(f"est-ds: {e}")
        leave_processes(preempt.EXIT_CODE)
    if world.is_first:
        _summary(config.run_dir)
    leave_processes()


def _branch(parsed: argparse.Namespace, arguments: list[str]) -> None:
    from est_ds.training.branch import branch

    print(branch(parsed.run, parsed.at, parsed.run_dir, parsed.overrides))


def _doctor(parsed: argparse.Namespace, arguments: list[str]) -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    from est_ds.doctor.visit import doctor

    sys.exit(doctor(parsed))


def _export(parsed: argparse.Namespace, arguments: list[str]) -> None:
    from est_ds.config.run_file import load_run
    from est_ds.export import Wish, export
    from est_ds.export.folder import MARK
    from est_ds.export.hub import find_hub
    from est_ds.export.part import Keep

    hub = None if parsed.push is None else find_hub(parsed.push)
    config = load_run(parsed.run, parsed.overrides)
    keep = Keep(parsed.layers, parsed.heads, parsed.columns, parsed.plan_step)
    wish = Wish(parsed.out, parsed.prompt, parsed.checkpoint, keep, parsed.skip_loss)
    done = export(config, wish)
    print(f"exported step {done.step} to {done.folder}")
    print(
        f"largest difference of logits, reloaded folder against the engine's weights: "
        f"{done.largest_difference:.3g}"
    )
    for line in done.lines:
        print(line)
    if done.sample is not None:
        print(f"sample: {done.sample!r}")
    if hub is not None:
        what = f"{Path(config.run_dir).resolve().name} after {done.step:,} steps"
        print(f"pushed to {hub.push(done.folder, what, without=MARK)}")


def _summary(run_dir: str) -> None:
    from est_ds.report.text import print_summary

    try:
        print_summary(run_dir)
    except UserError as e:  # the run is done all the same
        print(f"no summary: {e}")


if __name__ == "__main__":
    main()
