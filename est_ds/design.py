"""A run file understood: model, method and objective that fit together. Reads no data.

An `Outline` is what can be said without the model's library; torch and the library are imported
where a `Design`, which has them, is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from est_ds.config.deepspeed_keys import check_deepspeed_section
from est_ds.config.published import FROM
from est_ds.config.run_config import RunConfig
from est_ds.cost.known_models import ModelFacts, known_model
from est_ds.cost.parameters import pipe_stage_parameters
from est_ds.cost.pipe_cuts import pipe_cuts
from est_ds.data.mixture import PhaseWeights
from est_ds.data.objectives import objective_settings
from est_ds.data.objectives.base import Settings
from est_ds.errors import UserError
from est_ds.plans.lr import check_schedule, learning_rate
from est_ds.plans.methods import build_method
from est_ds.plans.methods.base import Method
from est_ds.plans.phases import phases_until
from est_ds.plans.plan import StepPlans
from est_ds.plans.shape import ModelShape

if TYPE_CHECKING:
    from torch import nn

    from est_ds.slicing.families.base import Family
    from est_ds.slicing.weights import Weights


@dataclass(frozen=True)
class Outline:
    """A run file whose model, method and objective fit together; nothing of the data is read, and
    nothing can be built.

    Attributes:
        facts: of the model.
    """

    config: RunConfig
    facts: ModelFacts
    method: Method
    objective: Settings

    @property
    def decoder_start(self) -> int | None:
        """First input of an encoder-decoder's decoder: the padding token, as T5 has it, unless the
        config says otherwise; None of any other model."""
        return self.facts.decoder_start

    @property
    def dropout(self) -> dict[str, float]:
        """The fields of the model that drop something in training, with their chances."""
        return self.facts.dropout

    @property
    def pipe_stage_parameters(self) -> tuple[int, ...]:
        """Parameters of every pipe stage; a tied one counts on every stage that holds it."""
        return pipe_stage_parameters(self.facts.pieces, self.cuts)

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
            UserError: the method's bands of layers, or their number, do not allow it.
        """
        return pipe_cuts(self.method, self.config.parallel, **self.flops_size(1))

    def plans(self, step: int) -> StepPlans:
        """The plans of the micro-batches of a step."""
        return self.method.plans(step, self.config.batch.micro_batches)

    @property
    def has_weights(self) -> bool:
        """Whether the run begins with published weights (`model.from`)."""
        return FROM in self.config.model

    def learning_rate(self, step: int) -> float:
        """The rate of a step."""
        config = self.config
        return learning_rate(
            config.schedule, config.optimizer.lr, step, config.steps, self.method.phases
        )

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
class Design(Outline):
    """A run that can be built."""

    hf_config: Any
    family: Family

    @property
    def draws_nothing(self) -> bool:
        """Whether these are all that it begins with: no layer is still to come."""
        return self.has_weights and len(self.method.layers(0)) == self.method.shape.num_layers

    def weights(self) -> Weights:
        """The published weights that the run begins with.

        Raises:
            UserError: they are not those of its model.
        """
        from est_ds.slicing.weights import Weights

        return Weights(self.config.model, self.hf_config, self.method.layers(0))

    def first_model(self) -> nn.Module:
        """The whole model in this process, in fp32, with what the run begins with.

        Raises:
            UserError: published weights are not those of its model.
        """
        import torch

        from est_ds.slicing.build import empty_model

        model = empty_model(self.hf_config)
        self.draw(model, [""])
        if self.has_weights:
            held = self.weights()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in held.names:  # others are of layers that are still to come
                        read = held.read(name, "weight", 0, parameter.numel())
                        parameter.copy_(read.view_as(parameter))
        return model

    def begin(self, model: nn.Module, paths: Iterable[str]) -> None:
        """Gives submodules of an empty model what the run begins with: drawn weights, or room for
        published ones, which are read into the engine.

        Args:
            paths: of the submodules; "" is the whole model.
        """
        from est_ds.slicing.build import allocate

        if self.draws_nothing:
            allocate(model, paths)
        else:
            self.draw(model, paths)

    def draw(self, model: nn.Module, paths: Iterable[str]) -> None:
        """Draws the weights of submodules of an empty model; whatever is drawn, at the start or
        when the model grows, is drawn here.

        Args:
            paths: of the submodules; "" is the whole model.
        """
        from est_ds.slicing.build import initialise
        from est_ds.slicing.families.fields import Init

        init = Init.model_validate(self.config.model.get("init", {}))
        std = init.residual_std(self.hf_config)
        initialise(model, paths, self.config.seed_of("model"), std)


def make_outline(config: RunConfig) -> Outline:
    """The design of a run file, or, in a small part of the time, its outline, where the model is
    understood without its library.

    Raises:
        UserError: see `make_design`.
    """
    facts = known_model(config.model, config.data.sequence)
    if facts is None:
        return make_design(config)
    check_deepspeed_section(config)
    outline = Outline(config, facts, *_method_and_objective(config, facts))
    outline.cuts
    return outline


def make_design(config: RunConfig) -> Design:
    """Checks model, method, objective, schedule and DeepSpeed section against each other.

    Raises:
        UserError: they do not fit.
    """
    from est_ds.slicing.families import family_of, hf_config

    check_deepspeed_section(config)
    hf = hf_config(config.model, config.data.sequence)
    facts = _facts(config, hf)
    parts = _method_and_objective(config, facts)
    design = Design(config, facts, *parts, hf, family_of(hf.model_type))
    design.cuts
    if design.draws_nothing and config.seeds.model is not None:
        raise UserError(
            f"seeds.model={config.seeds.model} cannot take effect with model.from, which gives all "
            f"first weights; remove it."
        )
    return design


def _facts(config: RunConfig, hf: Any) -> ModelFacts:
    """What the library says of the model.

    Raises:
        UserError: it cannot build it.
    """
    from est_ds.slicing.build import piece_sizes
    from est_ds.slicing.families import family_of
    from est_ds.slicing.families.fields import dropout_of

    dropout = dropout_of(hf)
    family = family_of(hf.model_type)
    start = getattr(hf, "decoder_start_token_id", None)
    if start is None and hf.is_encoder_decoder:
        start = hf.pad_token_id
    return ModelFacts(
        shape=family.shape(hf),
        pieces=piece_sizes(_built(hf, config)),
        dropout=dropout,
        head=family.auto_class,
        separable=family.separable,
        decoder_start=start if hf.is_encoder_decoder else None,
    )


def _method_and_objective(config: RunConfig, facts: ModelFacts) -> tuple[Method, Settings]:
    """The method and the objective of a run file, checked against the model and the other sections.

    Raises:
        UserError: they do not fit.
    """
    if config.batch.is_auto:
        raise UserError(
            "batch.micro=auto: only est-ds train (which starts the processes) and est-ds plan find "
            "out how much fits; give a number here."
        )
    _check_dropout(config, facts.dropout)
    shape = replace(facts.shape, sequence=config.data.sequence)
    seed, steps = config.seed_of("method"), config.steps
    method = build_method(config.method, seed=seed, steps=steps, shape=shape)
    check_schedule(config.schedule, steps, method.phases)
    objective = objective_settings(
        config.objective,
        head=facts.head,
        model_type=shape.family,
        encoder_decoder=shape.encoder_layers > 0,
    )
    if method.by_micro_batch:
        _check_micro_batches(config, shape)
    if shape.encoder_layers and facts.decoder_start is None:
        raise UserError(
            "model.pad_token_id=None and no model.decoder_start_token_id: the decoder has no first "
            "input; set one of them."
        )
    corpus_weights(config)
    if config.data.documents == "separate":
        _check_separable(config, facts, objective)
    return method, objective


def corpus_weights(config: RunConfig) -> tuple[PhaseWeights, ...]:
    """Weights of the training corpora by step.

    Raises:
        UserError: the phases of the data do not cover the run, or their weights are not exact.
    """
    data = config.data
    if data.phases:
        names, until = [""] * len(data.phases), [phase.until for phase in data.phases]
        phases = phases_until(names, until, config.steps, "data.phases")
        weights = [phase.weights for phase in data.phases]
        shares = tuple(PhaseWeights(phase.from_step, w) for phase, w in zip(phases, weights))
    else:
        shares = (PhaseWeights(0, tuple(part.weight for part in data.parts)),)
    for share in shares:
        share.parts  # raises
    return shares


def _check_dropout(config: RunConfig, dropout: dict[str, float]) -> None:
    """Checks that what the model drops can be drawn by address.

    Raises:
        UserError: it cannot.
    """
    for field, chance in dropout.items():
        if config.compile:
            raise UserError(
                f"compile=True does not work with model.{field}={chance} (Hugging Face's default, "
                f"if the run file does not set it): a compiled layer draws masks of its own, other "
                f"ones in every layout; set compile=false, or model.{field}=0.0."
            )


def _check_micro_batches(config: RunConfig, shape: ModelShape) -> None:
    """Checks that `method.draw: micro_batch` can take effect, and works.

    Raises:
        UserError: it does not.
    """
    batch = config.batch
    batch.accumulation(1)  # raises
    if batch.micro_batches == 1:
        raise UserError(
            f"method.draw=micro_batch cannot take effect: batch.micro={batch.micro} is the whole "
            f"batch.global={batch.global_}; lower batch.micro, or remove it."
        )
    zero = config.parallel.zero
    if shape.encoder_layers and zero == 3:
        # Its layers hand on the position bias as well, and ZeRO 3 gathers a layer when the first
        # gradient of what it returned comes: in another order where another layer is skipped.
        raise UserError(
            f"parallel.zero=3 does not work with method.draw=micro_batch and model_type "
            f"{shape.family!r}: replicas would gather layers in different orders; use "
            f"parallel.zero=2, or method.draw=step."
        )
    if config.deepspeed.get("zero_optimization", {}).get("overlap_comm") and zero < 3:
        raise UserError(
            "deepspeed.zero_optimization.overlap_comm=True does not work with "
            "method.draw=micro_batch below ZeRO 3: replicas reduce gradients in one order only "
            "after the backward; remove it, or set method.draw=step."
        )


def _check_separable(config: RunConfig, facts: ModelFacts, objective: Settings) -> None:
    unable = None
    if not facts.separable:
        unable = f"model.model_type={config.model['model_type']!r}, which knows no documents"
    elif not objective.separable:
        unable = f"objective.name={objective.name!r}, which takes its windows apart"
    if unable:
        raise UserError(
            f"data.documents='separate' does not work with {unable}; use data.documents=joined."
        )


def _built(hf: Any, config: RunConfig) -> nn.Module:
    from est_ds.slicing.build import empty_model

    try:
        return empty_model(hf)
    except Exception as e:  # whatever the library raises for values that do not fit
        field = _field_at_fault(config)
        raise UserError(
            f"{field or 'model'}: Hugging Face cannot build the model ({type(e).__name__}: "
            f"{' '.join(str(e).split())}); correct {'it' if field else 'the model section'}."
        ) from None


def _field_at_fault(config: RunConfig) -> str | None:
    """The field without which the model can be built, if there is one."""
    from est_ds.slicing.build import empty_model
    from est_ds.slicing.families import hf_config

    for key, value in config.model.items():
        others = {k: v for k, v in config.model.items() if k != key}
        try:
            empty_model(hf_config(others, config.data.sequence))
        except Exception:  # the model type itself, or another field is at fault
            continue
        return f"model.{key}={value!r}"
    return None
