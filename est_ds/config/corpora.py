"""The `data` section of a run file: corpora, how they are mixed and cut."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from est_ds.config.kinds import CorpusName, PlaceText, Position, Positive, absolute
from est_ds.config.strict import Strict


class CorpusShare(Strict):
    """A corpus of a mixture, and its share of the sequences.

    Attributes:
        corpus: prefix of its .bin and .idx, here or in a bucket.
        weight: its share, relative to the other corpora's weights.
    """

    corpus: PlaceText
    weight: Annotated[float, Field(gt=0.0)] | None = None


class DataPhase(Strict):
    """Weights of the corpora until a step.

    Attributes:
        until: where they end (a step, or a fraction of the run).
        weights: in the order of `data.train`, 0 for none.
    """

    until: Position
    weights: tuple[Annotated[float, Field(ge=0.0)], ...]


def _either(plain: str, other: str) -> Discriminator:
    return Discriminator(lambda value: plain if isinstance(value, str) else other)


class Data(Strict):
    """Packed corpora, their tokenizer, tokens of a sequence.

    Attributes:
        train: a prefix (of .bin and .idx), or a mixture of corpora by weight. A prefix in a bucket
            (`s3://BUCKET/FOLDER/NAME`, `gs://...` or `file:///...`) is copied to this machine
            before the start (`EST_DS_CACHE`, else `~/.cache/est_ds`); it needs its manifest.
        phases: weights of the mixture that change by step.
        valid: a held-out corpus's prefix, or prefixes by name, which are evaluated one by one.
        tokenizer: folder of the tokenizer that the corpora were packed with, here or in a bucket.
        sequence: tokens of a sequence.
        shuffle: `sequences`: every epoch has the same sequences, in an order of its own.
            `documents`: the documents are permuted too, before they are cut into sequences.
        documents: `joined`: attention sees all of a sequence. `separate`: only the token's own
            document, positions restart in each, and no label lies in another one.
        verify: what of the corpora's files is compared with their manifests before the start.
            `hashes` reads every byte, on every node.
    """

    train: Annotated[
        Annotated[PlaceText, Tag("<prefix>")]
        | Annotated[tuple[CorpusShare, ...], Field(min_length=1), Tag("<mixture>")],
        _either("<prefix>", "<mixture>"),
    ]
    phases: tuple[DataPhase, ...] = ()
    valid: Annotated[
        Annotated[PlaceText, Tag("<prefix>")]
        | Annotated[dict[CorpusName, PlaceText], Field(min_length=1), Tag("<names>")],
        _either("<prefix>", "<names>"),
    ]
    tokenizer: PlaceText
    sequence: Positive
    shuffle: Literal["sequences", "documents"] = "sequences"
    documents: Literal["joined", "separate"] = "joined"
    verify: Literal["sizes", "hashes"] = "sizes"

    @property
    def parts(self) -> tuple[CorpusShare, ...]:
        """The training corpora; one if it is no mixture."""
        return (
            (CorpusShare(corpus=self.train, weight=1.0),)
            if isinstance(self.train, str)
            else self.train
        )

    @property
    def held_out(self) -> dict[str, str]:
        """Prefixes of the held-out corpora by name; the name of one alone is `valid`."""
        return {"valid": self.valid} if isinstance(self.valid, str) else self.valid

    @field_validator("train", mode="before")
    @classmethod
    def _train_is_one_or_several(cls, value: Any) -> Any:
        several = isinstance(value, (list, tuple)) and all(
            isinstance(part, (dict, CorpusShare)) for part in value
        )
        if not isinstance(value, str) and not several:
            raise ValueError(
                "write the prefix of a corpus, or a list of {corpus: PREFIX, weight: SHARE}"
            )
        return value

    @field_validator("valid", mode="before")
    @classmethod
    def _valid_is_one_or_named(cls, value: Any) -> Any:
        if not isinstance(value, (str, dict)):
            raise ValueError("write the prefix of a corpus, or {NAME: PREFIX, ...}")
        return value

    @model_validator(mode="after")
    def _weights_take_effect(self) -> Data:
        if isinstance(self.train, str):
            if self.phases:
                raise ValueError(
                    "phases need a mixture: make train a list of corpora, or remove them"
                )
            return self
        names = [absolute(part.corpus) for part in self.train]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"train has the corpus {name} twice; add up its weights")
        for i, part in enumerate(self.train):
            if self.phases and part.weight is not None:
                raise ValueError(f"train[{i}].weight has no effect beside phases; remove it")
            if not self.phases and part.weight is None:
                raise ValueError(f"train[{i}].weight is missing; add it, or phases with weights")
        for i, phase in enumerate(self.phases):
            if len(phase.weights) != len(names):
                raise ValueError(
                    f"phases[{i}].weights has {len(phase.weights)} numbers for the {len(names)} "
                    f"corpora of train; give one each, 0 for none"
                )
            if not any(phase.weights):
                raise ValueError(f"phases[{i}].weights are all 0; at least one must be above 0")
        for name, weights in zip(names, zip(*(phase.weights for phase in self.phases))):
            if not any(weights):
                raise ValueError(f"train has the corpus {name}, whose weight is 0 in all phases")
        return self
