"""The state of a run at a checkpoint, and whether a run goes on from it."""

from __future__ import annotations

from est_ds.checkpoints.index import Index
from est_ds.checkpoints.state import Next, State
from est_ds.config.run_config import RunConfig
from est_ds.config.strict import checked
from est_ds.design import corpus_weights
from est_ds.errors import UserError
from est_ds.ranks.versions import versions
from est_ds.run.directory import differences
from est_ds.run.prepare import Run
from est_ds.training.divergence import History


def run_state(
    run: Run,
    done: int,
    history: History,
    trained_s: float | None,
    evaluation_due: bool = False,
) -> State:
    """Returns what a checkpoint after `done` steps holds besides weights and moments.

    Args:
        trained_s: what its steps took; see `State`.
    """
    return State(
        config=run.config.model_dump(mode="json", by_alias=True),
        versions=versions(),
        corpus=run.train.fingerprint,
        held_out={name: windows.corpus.fingerprint for name, windows in run.valid.items()},
        tokens=run.config.tokens_after(done),
        trained_s=trained_s,
        next=_next(run, done),
        divergence=history.seen,
        evaluation_due=evaluation_due,
    )


def first_steps(run: Run) -> set[int]:
    """Returns the first steps of phases, of the method's and of the data's."""
    shares = corpus_weights(run.config)
    return {phase.until_step for phase in run.method.phases} | {s.from_step for s in shares}


def _next(run: Run, step: int) -> Next | None:
    if step == run.config.steps:
        return None
    return Next(
        lr=run.learning_rate(step),
        plan_digest=run.plans(step).digest,
        data_digest=run.train.digest(step),
    )


def check_state(run: Run, resumed: Index | None) -> None:
    """Refuses a checkpoint that the run does not go on from as the one that wrote it would have.

    Raises:
        UserError: its config, its corpora or its next step are others; or there is none, and the
            run begins with one.
    """
    if resumed is None:
        _check_begins_at_0(run)
        return
    state = resumed.state
    if differing := differences(checked(RunConfig, state.config), run.config):
        raise UserError(
            f"the checkpoint is of a run of another config: {'; '.join(differing[:3])} (there: the "
            f"checkpoint). Set these fields as they were, or start a new run_dir."
        )
    _check_corpora(run, state.corpus)
    for name, fingerprint in state.held_out.items():
        if name in run.valid and run.valid[name].corpus.fingerprint != fingerprint:
            raise UserError(
                f"the held-out corpus {name!r} (data.valid) is not the one of this run's losses "
                f"(fingerprint {run.valid[name].corpus.fingerprint}, not {fingerprint}); point it "
                f"to that corpus, or give the new one another name."
            )
    then, now = state.next, _next(run, resumed.step)
    if then != now:
        wrote = ", ".join(f"{name} {version}" for name, version in state.versions.items())
        raise UserError(
            f"the run would not go on as it began: the next step after the checkpoint was to be "
            f"({then}), and with the versions here it is ({now}); install the versions that wrote "
            f"the checkpoint ({wrote}), or start a new run_dir."
        )


def _check_begins_at_0(run: Run) -> None:
    if run.config.start is not None:
        raise UserError(
            f"start.step={run.config.start.step}: the run begins with a checkpoint of that step, "
            f"and {str(run.directory / 'checkpoints')!r} holds none: put it back, or make the run "
            f"again with est-ds branch."
        )


def _check_corpora(run: Run, trained_on: str) -> None:
    then, now = trained_on.split("+"), run.train.fingerprint.split("+")
    for i, part in enumerate(run.config.data.parts):
        if now[i] not in then[i : i + 1]:
            raise UserError(
                f"data.train={part.corpus!r} is not the corpus that the checkpoint was trained on "
                f"(fingerprint {now[i]}, not {(*then, 'none')[i]}); point it to that corpus, or "
                f"start a new run_dir."
            )
