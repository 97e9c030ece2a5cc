"""`est-ds branch`: a new run that begins with a checkpoint of another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from est_ds.checkpoints import index as index_file
from est_ds.checkpoints.first import First, begin_run, check_unused
from est_ds.checkpoints.index import Damaged, Index, read_index
from est_ds.checkpoints.state import Seen, State
from est_ds.checkpoints.store import Store
from est_ds.config.run_config import RunConfig, steps_of_tokens
from est_ds.config.run_file import load_run
from est_ds.config.start import Start
from est_ds.config.strict import checked
from est_ds.design import Design, make_design
from est_ds.disk import describe
from est_ds.errors import UserError, gigabytes
from est_ds.ranks.world import launched
from est_ds.report.text import facts_table, rendered
from est_ds.run.directory import changed_fields, differences
from est_ds.run.parent import Parent, read_parent
from est_ds.run.prepare import Run, prepare
from est_ds.training.divergence import History
from est_ds.training.inherit import (
    Position,
    check_changes,
    check_depth,
    check_tokenizer,
    expected_positions,
    reading_of,
)
from est_ds.training.state import first_steps, run_state


@dataclass(frozen=True)
class Trunk:
    """A run, and the checkpoint of it that a branch begins with."""

    design: Design
    directory: Path
    folder: Path
    index: Index

    @property
    def config(self) -> RunConfig:
        return self.design.config

    @property
    def step(self) -> int:
        return self.index.step


def branch(run: str, at: str, new: str, overrides: list[str]) -> str:
    """Makes the directory of a branch; trains nothing.

    Args:
        run: run file or run directory of the parent.
        at: `latest`, `best`, or a number of steps: one of its checkpoints.
        new: the directory, in which nothing may be.
        overrides: changes to the parent's config.

    Returns:
        What is kept and what is not, for people.

    Raises:
        UserError: it cannot be; nothing is left of it.
    """
    if launched():
        raise UserError(
            "branch trains nothing; call it without a launcher, then start est-ds train."
        )
    if not new:
        raise UserError("--run-dir is empty; give the directory of the new run.")
    for override in overrides:
        if override.startswith(("run_dir=", "start=", "start.")):
            raise UserError(f"override {override!r:.80}: --run-dir and --at say that; remove it.")
    trunk = _trunk(run, at)
    check_unused(Path(new))
    if Path(new).resolve().is_relative_to(trunk.directory.resolve()):
        raise UserError(
            f"--run-dir={new!r} lies in the parent's directory, which may be removed; choose one "
            f"outside of {trunk.directory}."
        )
    config = load_run(trunk.directory, overrides)
    config = config.model_copy(update={"run_dir": new, "start": None})
    if config.tokens is not None:  # of the trunk and the branch together
        read = trunk.index.state.tokens
        steps = steps_of_tokens(config.tokens, config.tokens_per_step, trunk.step, read)
        config = config.model_copy(update={"steps": steps})
    copy_to = config.checkpoint.copy_to
    if copy_to and copy_to == trunk.config.checkpoint.copy_to:
        raise UserError(
            f"checkpoint.copy_to={copy_to!r} has the parent's copies; give the branch a folder of "
            f"its own (checkpoint.copy_to=URL), or none (checkpoint.copy_to=null)."
        )
    changed = changed_fields(trunk.config, config)
    changed = {field: values for field, values in changed.items() if _is_asked_for(field)}
    check_changes(trunk.config, config, changed, trunk.step)
    branched, positions = _prepared(trunk, config)
    check_depth(trunk.design.method, branched.method, trunk.step)
    first = First(_index(trunk, branched), trunk.folder, _parent(trunk, changed))
    links = begin_run(branched.config, first)
    return _text(trunk, branched, positions, first, links)


def _is_asked_for(field: str) -> bool:
    return field != "run_dir" and field.partition(".")[0] != "start"


def _trunk(run: str, at: str) -> Trunk:
    directory = Path(load_run(run).run_dir)
    config = load_run(directory)
    store = Store.of(directory)
    step = store.find(at)
    folder = store.path(step)
    try:
        index = read_index(folder)
    except Damaged as e:
        raise UserError(f"checkpoint {folder} is damaged: {e}; choose another --at.") from None
    if differing := differences(checked(RunConfig, index.state.config), config):
        raise UserError(
            f"checkpoint {folder} is of a run of another config than {directory}/config.yaml: "
            f"{'; '.join(differing[:3])} (there: the checkpoint); put the right one back."
        )
    return Trunk(make_design(config), directory, folder, index)


def _prepared(trunk: Trunk, config: RunConfig) -> tuple[Run, list[Position]]:
    """The branch with its `start`, and where its corpora stand."""
    run = prepare(config, config.parallel.pipe, branches=True)
    check_tokenizer(trunk.config, config)
    positions = expected_positions(trunk.config, trunk.index.state.corpus, run, trunk.step)
    start = Start(
        step=trunk.step,
        tokens=trunk.index.state.tokens,
        reading=reading_of(trunk.config, config, positions, trunk.step),
    )
    config = config.model_copy(update={"start": start})
    return prepare(config, config.parallel.pipe, branches=True), positions


def _index(trunk: Trunk, run: Run) -> Index:
    """`checkpoint.json` as the branch has it: what it resumes from is a checkpoint of its own."""
    former = trunk.index.state
    history = History(run.config.divergence, first_steps(run), _seen(trunk, run))
    state = run_state(run, trunk.step, history, former.trained_s, former.evaluation_due)
    counts = {"optimizer_steps": former.optimizer_steps, "births": former.births}
    state = state.model_copy(update=counts)
    loss = trunk.index.eval_loss if _same_held_out(trunk, run, state) else None
    return trunk.index.model_copy(update={"state": state, "eval_loss": loss})


def _seen(trunk: Trunk, run: Run) -> Seen:
    """Losses that the next one is compared with; none where the next step is another."""
    seen, then = trunk.index.state.divergence, trunk.index.state.next
    now = run.plans(trunk.step).digest, run.train.digest(trunk.step)
    if then is not None and (then.plan_digest, then.data_digest) == now:
        return seen
    past = {step: reason for step, reason in seen.skipped.items() if step < trunk.step}
    return Seen(skipped=past)


def _same_held_out(trunk: Trunk, run: Run, state: State) -> bool:
    """Whether the parent's held-out loss is one of the branch's: else `best` would compare them."""
    fields = {f"data.{name}" for name in ("sequence", "documents")}
    fields |= {f"evaluate.{name}" for name in ("sequences", "choice")}
    changed = changed_fields(trunk.config, run.config)
    return state.held_out == trunk.index.state.held_out and not any(
        field in fields or field.startswith("objective.") for field in changed
    )


def _parent(trunk: Trunk, changed: dict) -> Parent:
    return Parent(
        run_dir=str(trunk.directory.resolve()),
        step=trunk.step,
        config_sha256=describe(trunk.directory / "config.yaml").sha256,
        checkpoint_sha256=describe(trunk.folder / index_file.FILE).sha256,
        changed=changed,
        parent=read_parent(trunk.directory),
    )


def _text(trunk: Trunk, run: Run, positions: list[Position], first: First, links: int) -> str:
    step, config, state = trunk.step, run.config, first.index.state
    phase, num_files = run.method.phase_of(step), len(first.index.files)
    changed = [f"{k}: {_shown(a)} -> {_shown(b)}" for k, (a, b) in first.parent.changed.items()]
    before = f"{trunk.design.learning_rate(step - 1):.4g} before it" if step else "none before it"
    if step and step == trunk.config.first_step:
        before = f"the one before it is of {first.parent.parent.run_dir}"
    compared = len(state.divergence.losses)
    size = gigabytes(sum(file.bytes for file in first.index.files.values()))
    rows = [
        ("changed", "\n".join(changed) or "nothing"),
        (
            "kept: model",
            f"weights, AdamW's moments and its count of {state.optimizer_steps:,} steps",
        ),
        ("kept: step", f"{step:,} of {config.steps:,}; plans and masks are those of their step"),
        ("kept: tokens", f"{config.tokens_after(step):,} read, counted on"),
        *((f"{'kept' if p.is_kept else 'anew'}: data", str(p)) for p in positions),
        ("learning rate", f"{run.learning_rate(step):.4g} in step {step:,}, {before}"),
        ("phase", f"{phase.name}, steps {phase.from_step:,} to {phase.until_step - 1:,}"),
        *([("kept: losses", f"{compared:,}, to tell a spike by")] if compared else []),
        ("anew", "metrics.jsonl and TensorBoard" + ", losses to tell a spike by" * (not compared)),
        (
            "checkpoint",
            f"{num_files} file{'s' * (num_files > 1)}, {size} ({links} linked, {num_files - links} "
            f"copied); {trunk.directory} may be removed",
        ),
    ]
    head = f"{config.run_dir}: a branch of {trunk.directory} at step {step:,}"
    return rendered(head, facts_table(rows)) + f"\n\ngo on: est-ds train {config.run_dir}"


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
