"""Reads published weights (safetensors) under the names of a run's model, range by range.

A process reads what it holds and no more: a file is opened for a range and closed again, so that
no page of it stays in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from est_ds.config.published import FROM, SHA256, folder_of, published_config, weight_files
from est_ds.errors import UserError
from est_ds.slicing.build import empty_model
from est_ds.slicing.families import family_of, hf_config
from est_ds.slicing.families.base import layer_paths

DTYPES = ("F64", "F32", "F16", "BF16")
AT_ONCE = 1 << 24  # elements that are read at a time
# What published files hold besides the model that is trained: buffers of older versions, and heads.
LEFT_OUT = (
    r"(^|\.)rotary_emb\.inv_freq$",
    r"(^|\.)attn\.(masked_)?bias$",
    r"(^|\.)position_ids$",
    r"^bert\.pooler\.",
    r"^cls\.seq_relationship\.",
)
OLDER = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file."""

    file: Path
    key: str
    shape: tuple[int, ...]


class Weights:
    """The weights that a run begins with.

    Args:
        section: the `model` section, with `from`.
        config: Hugging Face config of the run's model.
        layers: the layers that the run begins with, which are those of the weights; the others
            are not there yet.

    Raises:
        UserError: they are not the weights of that model.
    """

    keys = frozenset({"weight"})

    def __init__(self, section: dict[str, Any], config: Any, layers: Iterable[int]) -> None:
        self._name, self._section = section[FROM], section
        self._folder = folder_of(self._name)
        self._published = published_config(self._folder)
        model, places = empty_model(config), list(layers)
        held = self._stored(model, self._moved(config, places))
        self._tied = [
            (k, s) for k, s in model.all_tied_weights_keys.items() if {k, s} <= held.keys()
        ]
        for name, source in model.all_tied_weights_keys.items():
            if name in held:
                held.setdefault(source, held[name])
        absent = {p for i, p in _paths(config).items() if i not in places}
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        expected = {n: s for n, s in shapes.items() if not n.startswith(tuple(absent))}
        self._check(expected, held)
        self._held = held
        self.names = frozenset(expected)

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements start to stop of a flattened parameter, [stop - start], as they are stored."""
        assert state in self.keys, state
        return torch.cat(list(self._blocks(self._held[name], start, stop)))

    def check_ties(self) -> None:
        """Compares what the files hold twice and the model once.

        Raises:
            UserError: it differs.
        """
        for name, source in self._tied:
            one, other = self._held[name], self._held[source]
            size = prod(one.shape)
            pairs = zip(self._blocks(one, 0, size), self._blocks(other, 0, size))
            if one.shape != other.shape or not all(torch.equal(a, b) for a, b in pairs):
                raise UserError(
                    f"{self._said}: {name} and {source} are one parameter of the model, and differ "
                    f"in the files; {self._change('set model.tie_word_embeddings=false')}."
                )

    @property
    def _said(self) -> str:
        return f"model.{FROM}={self._name!r}"

    def _moved(self, config: Any, places: list[int]) -> dict[str, str]:
        """What the names of layers begin with in the files, and in the model.

        Raises:
            UserError: the files are of a model of another shape.
        """
        theirs = hf_config(self._published)
        family, there = family_of(config.model_type), family_of(theirs.model_type)
        shape, published = family.shape(config), there.shape(theirs)
        if len(published.layers) != len(places):
            raise UserError(
                f"{self._said} has {len(published.layers)} layers, and the run begins with "
                f"{len(places)} of its {shape.num_layers}; give a model of {len(places)} layers, "
                f"leave the number out, or grow the model (method.name=stacking with "
                f"method.phases[0].layers={len(published.layers)})."
            )
        alike = (config.model_type, shape.hidden, shape.vocabulary)
        if alike != (theirs.model_type, published.hidden, published.vocabulary) or any(
            layer != shape.layers[place] for layer, place in zip(published.layers, places)
        ):
            raise UserError(
                f"{self._said} is a model of another shape than this section; "
                f"{self._change('give weights of that shape')}."
            )
        own = _paths(config)
        return {path: own[places[i]] for i, path in _paths(theirs).items()}

    def _change(self, otherwise: str) -> str:
        """What to do: the fields that the run file changes, or something else."""
        theirs = self._published
        changed = [
            f"model.{key}={value!r} (there: {theirs.get(key, 'not set')!r})"
            for key, value in self._section.items()
            if key not in (FROM, SHA256) and (key not in theirs or theirs[key] != value)
        ]
        return f"leave {', '.join(changed)} out, or {otherwise}" if changed else otherwise

    def _stored(self, model: nn.Module, moved: dict[str, str]) -> dict[str, _Stored]:
        """The tensors of all files by the names that they have in the model.

        Raises:
            UserError: a file cannot be read, or holds what the model has no place for.
        """
        names = set(dict(model.named_parameters(remove_duplicate=False)))
        left_out = [*LEFT_OUT, *(model._keys_to_ignore_on_load_unexpected or ())]
        found: dict[str, _Stored] = {}
        others = []
        for stored, dtype in _tensors(weight_files(self._folder)):
            name = _todays(stored.key, f"{model.base_model_prefix}.", moved, names)
            if name not in names:
                if not any(re.search(pattern, stored.key) for pattern in left_out):
                    others.append(stored.key)
                continue
            if dtype not in DTYPES:
                raise UserError(
                    f"{self._said}: {stored.key} is of type {dtype}; use weights that are not "
                    f"quantised ({', '.join(DTYPES)})."
                )
            found[name] = stored
        if others:
            raise UserError(
                f"{self._said}: the model has no place for {_listed(others)}; "
                f"{self._change('use weights of this very model')}."
            )
        return found

    def _check(self, expected: dict[str, tuple[int, ...]], held: dict[str, _Stored]) -> None:
        if missing := [name for name in expected if name not in held]:
            raise UserError(
                f"{self._said}: the files lack {_listed(missing)}; "
                f"{self._change('copy the folder again')}."
            )
        for name, shape in expected.items():
            if held[name].shape != shape:
                raise UserError(
                    f"{self._said}: {name} has the shape {held[name].shape} there, and {shape} in "
                    f"this run; {self._change('use weights of this very model')}."
                )

    def _blocks(self, stored: _Stored, start: int, stop: int) -> Iterator[Tensor]:
        """A range of a tensor, in pieces of which none is large."""
        row = prod(stored.shape[1:])
        for at in range(start, stop, AT_ONCE):
            end = min(at + AT_ONCE, stop)
            first = at // row
            with safe_open(stored.file, "pt") as file:
                rows = file.get_slice(stored.key)[first : -(-end // row)].reshape(-1)
                yield rows[at - first * row : end - first * row].clone()


def _tensors(files: list[Path]) -> Iterator[tuple[_Stored, str]]:
    """Every tensor, with its type."""
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    yield _Stored(path, key, tuple(part.get_shape())), part.get_dtype()
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path} cannot be read ({e}); copy it again.") from None


def _paths(config: Any) -> dict[int, str]:
    return layer_paths(family_of(config.model_type).pieces(config))


def _todays(key: str, prefix: str, moved: dict[str, str], names: set[str]) -> str:
    """The name of a stored tensor in the model.

    Args:
        prefix: what names begin with that files of a model without its head leave out.
        moved: see `Weights._moved`.
        names: of the model.
    """
    for older, name in OLDER:
        key = re.sub(older, name, key)
    for name in (key, prefix + key):
        for path, own in moved.items():
            if name.startswith(path):
                return own + name.removeprefix(path)
        if name in names:
            return name
    return key


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
