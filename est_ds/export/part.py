"""The part of a model that somebody chose to keep, as a plan."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from est_ds.errors import UserError
from est_ds.plans.methods.base import Method
from est_ds.plans.plan import Kept, LayerPlan, Plan
from est_ds.plans.shape import Attention, ModelShape, Part, StateSpace


@dataclass(frozen=True)
class Keep:
    """What to keep of a model; all None is the whole of it.

    Attributes:
        layers: indices as `0-5,8` (first and last included); of an encoder-decoder the encoder's,
            then the decoder's.
        heads: query heads, the same in every layer, as indices.
        columns: MLP columns, the same in every layer, as indices.
        plan_step: the step whose plan is kept, in place of the others; of a step whose
            micro-batches have plans of their own, the first one's.
    """

    layers: str | None = None
    heads: str | None = None
    columns: str | None = None
    plan_step: int | None = None

    def __str__(self) -> str:
        given = [(n, v) for n, v in vars(self).items() if v is not None]
        return " ".join(f"--{name.replace('_', '-')}={value}" for name, value in given)


def plan_to_keep(keep: Keep, method: Method, done: int) -> Plan | None:
    """The plan of what is kept of a model after `done` steps; None: the full model.

    Raises:
        UserError: it keeps everything, or layers that do not exist yet, or an index is wrong.
    """
    grown = method.whole(done - 1)  # of a model that still grows
    if keep == Keep():
        return grown
    if keep.plan_step is None:
        plan = _named(keep, method.shape)
    elif (keep.layers, keep.heads, keep.columns) != (None, None, None):
        raise UserError("--plan-step names a whole plan; leave --layers, --heads, --columns out.")
    elif keep.plan_step >= method.steps:
        raise UserError(f"{keep}: the run's steps are 0 to {method.steps - 1}.")
    else:
        plan = method.plan(keep.plan_step)
    if plan.is_full:
        raise UserError(f"{keep} keeps the whole model; leave it out to export that.")
    missing = set(plan.kept_layers) - set(grown.kept_layers) if grown else set()
    if missing:
        raise UserError(
            f"{keep} keeps layers {sorted(missing)}, which do not exist after "
            f"{done} steps: the model has grown to {list(grown.kept_layers)}."
        )
    return plan


def _named(keep: Keep, shape: ModelShape) -> Plan:
    if keep.heads is not None and not shape.has_attention:
        raise UserError(
            f"--heads={keep.heads:.80} cannot take effect: model_type {shape.family!r} has no "
            f"attention; use --columns, or --layers."
        )
    layers = range(shape.num_layers)
    if keep.layers is not None:
        layers = _indices("--layers", keep.layers, shape.num_layers).tolist()

    def of_layer(i: int) -> LayerPlan | None:
        if i not in layers:
            return None
        return LayerPlan(tuple(_kept(part, keep.heads, keep.columns) for part in shape.layers[i]))

    return Plan(0, 0, tuple(of_layer(i) for i in range(shape.num_layers)))


def _kept(part: Part, heads: str | None, columns: str | None) -> Kept:
    flag, text = ("--heads", heads) if isinstance(part, Attention) else ("--columns", columns)
    if text is None:
        return Kept(None, part.units)
    units = _indices(flag, text, part.units)
    if len(units) == part.units:
        return Kept(None, part.units)
    if isinstance(part, StateSpace):
        _check_groups(units, part, text)
    if not isinstance(part, Attention):
        return Kept(units, part.units)
    per_group = part.heads // part.key_value_groups
    groups, counts = np.unique(units // per_group, return_counts=True)
    if len(set(counts.tolist())) > 1:
        shown = ", ".join(f"{n} of K/V head {g}" for g, n in zip(groups, counts))
        raise UserError(
            f"--heads={text}: {shown}; {per_group} query heads in a row share a K/V head: keep "
            f"equally many of each, or none."
        )
    return Kept(
        units, part.units, key_value_groups=None if len(groups) == part.key_value_groups else groups
    )


def _check_groups(units: np.ndarray, part: StateSpace, text: str) -> None:
    """Checks that every group keeps equally many columns.

    Raises:
        UserError: it does not.
    """
    per_group = part.columns // part.groups
    counts = np.bincount(units // per_group, minlength=part.groups)
    if len(set(counts.tolist())) > 1:
        raise UserError(
            f"--columns={text:.80} keeps {counts.tolist()} heads of the {part.groups} groups "
            f"(model.n_groups) of {per_group} heads in a row; keep equally many of each."
        )


def _indices(flag: str, text: str, total: int) -> np.ndarray:
    """`0-5,8` as sorted int64 indices below `total`."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < total:
            raise UserError(
                f"{flag}={text:.80}: {part.strip()!r:.40} is no index or range (as 0-5,8) of 0 to "
                f"{total - 1}."
            )
        found.update(range(first, last + 1))
    return np.array(sorted(found), dtype=np.int64)
