"""A run file brought to life: everything checked and opened that costs no training."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

from est_ds.config.kinds import is_url
from est_ds.config.published import FROM, folder_of, has_begun
from est_ds.config.run_config import RunConfig
from est_ds.data.auto_tokenizer import check_same_tokenizer
from est_ds.data.indexed import Corpus
from est_ds.data.loader import Batches, Ordering, Portion, Sampling, Windows
from est_ds.data.objectives.base import Objective, Surroundings
from est_ds.data.remote import check_installed
from est_ds.data.tokenizer import is_tokenizer
from est_ds.design import Design, Outline, corpus_weights, make_design, make_outline
from est_ds.errors import UserError
from est_ds.run.directory import check_run_dir


@dataclass(frozen=True)
class Run(Design):
    """A run that can start with `processes` processes: its corpora are open."""

    processes: int
    train: Batches
    valid: dict[str, Windows]

    @property
    def tokens_per_step(self) -> int:
        return self.config.tokens_per_step

    @property
    def directory(self) -> Path:
        return Path(self.config.run_dir)

    def check_hashes(self) -> None:
        """Compares every byte of the corpora with their manifests.

        Raises:
            UserError: a file was altered, or a corpus has no manifest.
        """
        for windows in (*self.train.corpora, *self.valid.values()):
            windows.corpus.check_hashes()


def prepare(config: RunConfig, processes: int, *, branches: bool = False) -> Run:
    """Everything `make_design` checks, the batch equation, the corpora, the run directory, and the
    published weights of a run that has still to begin with them.

    Args:
        branches: the run will begin with a checkpoint of another.

    Raises:
        UserError: something does not fit or is missing; nothing has been written.
    """
    design = make_design(config)
    train, valid = _checked_data(design, processes, branches)
    parts = {f.name: getattr(design, f.name) for f in fields(design)}
    return Run(**parts, processes=processes, train=train, valid=valid)


def check_run(config: RunConfig, processes: int) -> Path:
    """What `prepare` checks, for who starts the processes and builds nothing: seconds earlier
    where the model is understood without its library.

    Returns:
        The run directory.

    Raises:
        UserError: something does not fit or is missing.
    """
    _checked_data(make_outline(config), processes, branches=False)
    return Path(config.run_dir)


def _checked_data(
    design: Outline, processes: int, branches: bool
) -> tuple[Batches, dict[str, Windows]]:
    """The samples to train and to evaluate on, of a run that can start."""
    config, data = design.config, design.config.data
    if "zero_optimization" in config.deepspeed:
        from est_ds.engine.settings import check_zero_section

        check_zero_section(config)
    _check_compiler(config)
    if copy_to := config.checkpoint.copy_to:
        check_installed(copy_to, f"checkpoint.copy_to={copy_to!r}")
    config.batch.accumulation(config.data_parallel(processes))
    train = [Corpus.open(part.corpus) for part in data.parts]
    valid = {name: Corpus.open(prefix) for name, prefix in data.held_out.items()}
    for corpus in (*train, *valid.values()):
        _check_corpus(design, corpus)
        corpus.check_tokenizer(data.tokenizer)
    batches, windows = _data(design, train, valid)
    check_run_dir(config)
    if not branches:
        _check_weights(design)
    return batches, windows


def unchecked_data(design: Outline) -> list[str]:
    """Checks the corpora as a start does, as far as they are here; a plan is made elsewhere too.

    Returns:
        Paths of what is not here, and so is not checked.

    Raises:
        UserError: what is here does not fit.
    """
    data = design.config.data
    train = [Corpus.described(part.corpus) for part in data.parts]
    valid = {name: Corpus.described(prefix) for name, prefix in data.held_out.items()}
    prefixes = [*(part.corpus for part in data.parts), *data.held_out.values()]
    corpora = dict(zip(prefixes, (*train, *valid.values())))
    absent = [p for p, corpus in corpora.items() if corpus is None]
    absent += [f"{p} (but its manifest)" for p, c in corpora.items() if c and not c.shards]
    has_tokenizer = not is_url(data.tokenizer) and Path(data.tokenizer).exists()
    if not has_tokenizer:
        absent.append(data.tokenizer)
    for corpus in filter(None, corpora.values()):
        _check_corpus(design, corpus)
        if has_tokenizer:
            corpus.check_tokenizer(data.tokenizer)
    if None not in corpora.values():
        _data(design, train, valid)
    _check_weights(design, has_tokenizer)
    return absent


def _check_weights(design: Outline, has_tokenizer: bool = True) -> None:
    """Checks the published weights that a run is still to begin with, and their tokenizer if one
    lies beside them.

    Args:
        has_tokenizer: whether the corpora's tokenizer is here.

    Raises:
        UserError: they are not those of the run's model, or of its corpora's ids.
    """
    if not design.has_weights or has_begun(Path(design.config.run_dir)):
        return
    assert isinstance(design, Design)  # an outline is of a model without published weights
    design.weights().check_ties()
    folder = folder_of(design.config.model[FROM])
    if has_tokenizer and is_tokenizer(folder):
        check_same_tokenizer(design.config.data.tokenizer, folder)


def _check_corpus(design: Outline, corpus: Corpus) -> None:
    """Checks that a corpus' tokens and documents are what the run takes them for.

    Raises:
        UserError: they are not.
    """
    corpus.check_vocabulary(design.method.shape.vocabulary)
    given = getattr(design.objective, "vocabulary", None)
    if given and not corpus.manifest:  # above it come the objective's own ids
        corpus.check_vocabulary(given, "objective.vocabulary")
    data = design.config.data
    if data.documents == "separate" or data.shuffle == "documents":
        corpus.check_boundaries()


def _data(
    design: Outline, train: list[Corpus], valid: dict[str, Corpus]
) -> tuple[Batches, dict[str, Windows]]:
    """The samples to train and to evaluate on.

    Raises:
        UserError: the corpora do not fit the objective, the batch or each other.
    """
    config, data = design.config, design.config.data
    _refuse_copies(train, valid)
    _refuse_unlike([*train, *valid.values()])
    sampling = _sampling(design, train)
    ordering = Ordering(
        global_batch=config.batch.global_,
        seed=config.seed_of("data"),
        weights=corpus_weights(config),
        shuffled=data.shuffle == "documents",
        reading=config.start.reading if config.start else None,
    )
    batches = Batches(train, sampling, ordering)
    choice = config.evaluate.choice
    windows = {name: Windows(corpus, sampling, choice=choice) for name, corpus in valid.items()}
    for held_out in windows.values():
        held_out.held_out(config.evaluate.sequences, Portion(0, 1, micro=1))  # raises
    return batches, windows


def _check_compiler(config: RunConfig) -> None:
    if not config.compile:
        return
    import torch

    compiler = os.environ.get("CXX", "g++")
    if not torch.cuda.is_available() and not shutil.which(compiler):
        raise UserError(
            f"compile=True needs a C++ compiler on a machine without GPU, and there is no "
            f"{compiler!r}; install it (or name another in CXX), or set compile=false."
        )


def _refuse_copies(corpora: list[Corpus], held_out: dict[str, Corpus]) -> None:
    seen: dict[str, str] = {}
    for name, corpus in held_out.items():
        other = seen.setdefault(corpus.fingerprint, name)
        if other != name:
            raise UserError(f"data.valid.{name} has the same contents as {other}; list it once.")
    seen = {}
    for corpus in corpora:
        other = seen.setdefault(corpus.fingerprint, corpus.prefix)
        if other != corpus.prefix:
            raise UserError(
                f"data.train: {corpus.prefix} has the same contents as {other}, so every sequence "
                f"would come twice in an epoch; list one of them, with the sum of the weights."
            )


def _refuse_unlike(corpora: list[Corpus]) -> None:
    """Of corpora with and without BOS or EOS, a model would be trained on one kind of document and
    evaluated on the other."""
    known = [corpus for corpus in corpora if corpus.manifest]
    for corpus in known:
        for name in ("bos", "eos"):
            here, first = (getattr(c.manifest, f"{name}_id") for c in (corpus, known[0]))
            if here != first:
                raise UserError(
                    f"data: {corpus.prefix} was packed with {name}={here} around its documents, "
                    f"but {known[0].prefix} with {name}={first}; pack one of them again with the "
                    f"other's --{name} or --no-{name}."
                )


def held_out_windows(design: Design) -> dict[str, Windows]:
    """The samples of the held-out corpora, where nothing is to be trained.

    The training corpora, by whose manifests the objective goes, need not be there: those of the
    held-out ones, which the same tokenizer made, serve as well.

    Raises:
        UserError: a held-out corpus is missing, or does not fit the model or the tokenizer.
    """
    data = design.config.data
    held_out = {name: Corpus.open(prefix) for name, prefix in data.held_out.items()}
    for corpus in held_out.values():
        _check_corpus(design, corpus)
        corpus.check_tokenizer(data.tokenizer)
    try:
        known = [Corpus.described(part.corpus) for part in data.parts]
    except UserError:
        known = [None]
    described = [corpus for corpus in known if corpus]
    whole = len(described) == len(data.parts)
    sampling = _sampling(design, described if whole else list(held_out.values()))
    choice = design.config.evaluate.choice
    return {n: Windows(c, sampling, choice=choice) for n, c in held_out.items()}


def _sampling(design: Outline, corpora: list[Corpus]) -> Sampling:
    """What a sample is.

    Args:
        corpora: by whose manifests the objective goes.
    """
    data = design.config.data
    objective = _objective(design, corpora)
    return Sampling(
        sequence=data.sequence, objective=objective, separate=data.documents == "separate"
    )


def _objective(design: Outline, corpora: list[Corpus]) -> Objective:
    surroundings = Surroundings.of(
        corpora,
        sequence=design.config.data.sequence,
        model_vocabulary=design.method.shape.vocabulary,
        decoder_start=design.decoder_start,
    )
    return design.objective.build(surroundings)
