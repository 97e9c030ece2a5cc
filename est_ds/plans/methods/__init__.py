"""The methods by name. A new method is one file, one line here and one YAML preset."""

from __future__ import annotations

from typing import Any

from est_ds.config.strict import checked
from est_ds.errors import UserError, did_you_mean
from est_ds.plans.methods.base import Method
from est_ds.plans.methods.decay_drop import DecayDrop
from est_ds.plans.methods.est import Est
from est_ds.plans.methods.full import Full
from est_ds.plans.methods.layer_drop import LayerDrop
from est_ds.plans.methods.pld import Pld
from est_ds.plans.methods.raptr import Raptr
from est_ds.plans.methods.stacking import Stacking
from est_ds.plans.methods.static import Static
from est_ds.plans.methods.token_drop import TokenDrop
from est_ds.plans.shape import ModelShape

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "est": Est,
    "raptr": Raptr,
    "layer_drop": LayerDrop,
    "pld": Pld,
    "decay_drop": DecayDrop,
    "static": Static,
    "stacking": Stacking,
    "token_drop": TokenDrop,
}


def build_method(section: dict[str, Any], *, seed: int, steps: int, shape: ModelShape) -> Method:
    """The method that the run file's `method` section describes.

    Raises:
        UserError: an unknown name or setting, or settings that do not fit the model or the run.
    """
    name = section.get("name")
    if name not in METHODS:
        hint = did_you_mean(str(name), METHODS)
        raise UserError(f"method.name={name!r}: {hint}use one of {', '.join(METHODS)}.")
    method = METHODS[name]
    settings = checked(method.Settings, section, "method")
    return method(settings, seed=seed, steps=steps, shape=shape)
