"""A run file brought to life: everything checked and opened that costs no training."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from est_ds.config.deepspeed_keys import check_deepspeed_section
from est_ds.config.sections import RunConfig
from est_ds.cost.pipe_cuts import pipe_cuts
from est_ds.data.indexed import Corpus
from est_ds.data.loader import Batches, Windows
from est_ds.data.mixture import Share
from est_ds.data.objectives import objective_settings
from est_ds.data.objectives.base import Objective, Settings, Surroundings
from est_ds.errors import UserError
from est_ds.plans.lr import check_schedule
from est_ds.plans.methods import build_method
from est_ds.plans.methods.base import Method
from est_ds.plans.phases import phases_until
from est_ds.run.directory import check_run_dir
from est_ds.slicing.build import empty_model
from est_ds.slicing.families import family_of, hf_config
from est_ds.slicing.families.base import Family


@dataclass(frozen=True)
class Planned:
    """A run file whose model, method and objective fit together; nothing of the data is read."""

    config: RunConfig
    hf_config: Any
    family: Family
    method: Method
    objective: Settings

    @property
    def target_sequence(self) -> int | None:
        """Decoder tokens of a sample of an encoder-decoder; None of any other model."""
        if not self.method.shape.encoder_layers:
            return None
        return self.objective.target_sequence(self.config.data.sequence)

    @cached_property
    def cuts(self) -> list[int]:
        """Ends of the layer ranges of the pipe stages.

        Raises:
            UserError: the method's runs of layers, or their number, do not allow it.
        """
        return pipe_cuts(self.method, self.config.parallel, **self.flops_size(1))

    def flops_size(self, sequences: float) -> dict[str, float | None]:
        """The sizes that `flops.step_flops` takes, of that many sequences."""
        sequence, target = self.config.data.sequence, self.target_sequence
        return {
            "tokens": sequences * sequence,
            "sequence": sequence,
            "target_tokens": None if target is None else sequences * target,
            "target_sequence": target,
        }


@dataclass(frozen=True)
class Run(Planned):
    """A run that can start with `processes` processes: its corpora are open."""

    processes: int
    train: Batches
    valid: dict[str, Windows]

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch.global_ * self.config.data.sequence

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


def plan_run(config: RunConfig) -> Planned:
    """Checks model, method, objective, schedule and DeepSpeed section against each other.

    Raises:
        UserError: they do not fit.
    """
    check_deepspeed_section(config)
    check_schedule(config.schedule, config.steps)
    hf = hf_config(config.model, config.data.sequence)
    _refuse_dropout(hf)
    _check_builds(hf)
    family = family_of(hf.model_type)
    shape = family.shape(hf)
    method = build_method(config.method, seed=config.seed, steps=config.steps, shape=shape)
    objective = objective_settings(
        config.objective,
        head=family.auto_class,
        model_type=hf.model_type,
        encoder_decoder=shape.encoder_layers > 0,
    )
    planned = Planned(config, hf, family, method, objective)
    planned.cuts
    data_shares(config)
    if config.data.documents == "separate":
        _check_separable(config, family, objective)
    return planned


def data_shares(config: RunConfig) -> tuple[Share, ...]:
    """Weights of the training corpora by step.

    Raises:
        UserError: the phases of the data do not cover the run, or their weights are not exact.
    """
    data = config.data
    if data.phases:
        names, until = [""] * len(data.phases), [phase.until for phase in data.phases]
        phases = phases_until(names, until, config.steps, "data.phases")
        weights = [phase.weights for phase in data.phases]
        shares = tuple(Share(phase.from_step, w) for phase, w in zip(phases, weights))
    else:
        shares = (Share(0, tuple(part.weight for part in data.parts)),)
    for share in shares:
        share.parts  # raises
    return shares


def _check_separable(config: RunConfig, family: Family, objective: Settings) -> None:
    unable = None
    if not family.separable:
        unable = f"model.model_type={config.model['model_type']!r}, whose positions are relative"
    elif not objective.separable:
        unable = f"objective.name={objective.name!r}, which takes its windows apart"
    if unable:
        raise UserError(
            f"data.documents='separate' does not work with {unable}; use data.documents=joined."
        )


def _check_builds(hf: Any) -> None:
    try:
        empty_model(hf)
    except Exception as e:  # whatever the library raises for values that do not fit
        raise UserError(
            f"model: Hugging Face cannot build it ({type(e).__name__}: {' '.join(str(e).split())}); "
            f"correct the model section."
        ) from None


def _refuse_dropout(hf: Any) -> None:
    for field, value in hf.to_dict().items():
        used = "drop" in field and not field.startswith(("summary", "classifier"))
        if used and isinstance(value, float) and value > 0:
            raise UserError(
                f"model.{field}={value} (Hugging Face's default, if the run file does not set it): "
                f"dropout draws from a global generator, so that a resumed run or another layout "
                f"would train something else; set model.{field}=0.0."
            )


def prepare(config: RunConfig, processes: int) -> Run:
    """Everything `plan_run` checks, the batch equation, the corpora and the run directory.

    Raises:
        UserError: something does not fit or is missing; nothing has been written.
    """
    planned = plan_run(config)
    _check_compiler(config)
    config.batch.accumulation(config.data_parallel(processes))
    data = config.data
    train = [Corpus.open(part.corpus) for part in data.parts]
    valid = {name: Corpus.open(prefix) for name, prefix in data.held_out.items()}
    _refuse_copies(train, valid)
    _refuse_unlike([*train, *valid.values()])
    for corpus in (*train, *valid.values()):
        corpus.check_vocabulary(planned.method.shape.vocabulary)
        given = getattr(planned.objective, "vocabulary", None)
        if given and not corpus.manifest:  # above it come the objective's own ids
            corpus.check_vocabulary(given, "objective.vocabulary")
        corpus.check_tokenizer(data.tokenizer)
        if data.documents == "separate" or data.shuffle == "documents":
            corpus.check_boundaries()
    objective = _objective(planned, train)
    sample = {
        "sequence": data.sequence,
        "objective": objective,
        "separate": data.documents == "separate",
    }
    batches = Batches(
        train,
        global_batch=config.batch.global_,
        seed=config.seed,
        shares=data_shares(config),
        shuffled=data.shuffle == "documents",
        **sample,
    )
    windows = {name: Windows(corpus, **sample) for name, corpus in valid.items()}
    for held_out in windows.values():
        held_out.held_out(config.evaluate.sequences, rank=0, world=1, micro=1)
    check_run_dir(config)
    parts = {f.name: getattr(planned, f.name) for f in fields(planned)}
    return Run(**parts, processes=processes, train=batches, valid=windows)


def _check_compiler(config: RunConfig) -> None:
    compiler = os.environ.get("CXX", "g++")
    if config.compile and not torch.cuda.is_available() and not shutil.which(compiler):
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
                f"data.train: {corpus.prefix} has the same contents as {other}, so that its "
                f"sequences would come twice an epoch; list one of them, with both weights."
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


def _objective(planned: Planned, corpora: list[Corpus]) -> Objective:
    shape, hf = planned.method.shape, planned.hf_config
    # T5's decoder begins with the padding token, unless its config says otherwise.
    start = getattr(hf, "decoder_start_token_id", None) or hf.pad_token_id
    surroundings = Surroundings.of(
        corpora,
        sequence=planned.config.data.sequence,
        model_vocabulary=shape.vocabulary,
        decoder_start=start if shape.encoder_layers else None,
    )
    return planned.objective.build(surroundings)
