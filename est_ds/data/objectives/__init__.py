"""The objectives. A new one is one file and one line here.

Inputs and labels of a sample are a pure function of its tokens and of draws addressed by (seed,
sample): neither layout nor history enters.
"""

from __future__ import annotations

from typing import Any

from est_ds.config.strict import checked
from est_ds.data.objectives.base import Settings
from est_ds.data.objectives.causal import CausalSettings
from est_ds.data.objectives.mlm import MlmSettings
from est_ds.data.objectives.ul2 import Ul2Settings
from est_ds.errors import UserError, did_you_mean

OBJECTIVES: dict[str, type[Settings]] = {
    "causal": CausalSettings,
    "mlm": MlmSettings,
    "ul2": Ul2Settings,
}


def objective_settings(
    section: dict[str, Any], *, head: str, model_type: str, encoder_decoder: bool
) -> Settings:
    """The `objective` section of a run file, checked against the model.

    Args:
        head: the library's class that builds the model.

    Raises:
        UserError: an unknown objective or setting, or one that does not fit the model.
    """
    name = section.get("name")
    if name not in OBJECTIVES:
        raise UserError(
            f"objective.name={name!r} is not known; {did_you_mean(name, OBJECTIVES)}"
            f"Known are {', '.join(OBJECTIVES)}."
        )
    settings = checked(OBJECTIVES[name], section, where="objective")
    if head not in settings.heads:
        fitting = [known for known, kind in OBJECTIVES.items() if head in kind.heads]
        raise UserError(
            f"objective.name={name!r} does not fit model.model_type={model_type!r}; use "
            f"objective.name={' or '.join(fitting)}, or another model."
        )
    settings.check(encoder_decoder)
    return settings
