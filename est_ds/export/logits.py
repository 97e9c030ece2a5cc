"""Proves that a reloaded folder computes the logits of the weights that the engine saved."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from est_ds.design import Design
from est_ds.errors import Failure
from est_ds.plans.plan import Plan
from est_ds.slicing.subnetwork import Subnetwork

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # the same arithmetic in another order


@torch.no_grad()
def check_logits(
    design: Design, model: nn.Module, plan: Plan | None, reloaded: nn.Module, ids_BT: Tensor
) -> float:
    """Compares the full model's pieces in a row, as a pipeline runs them, with the folder.

    Args:
        plan: active on the pieces.

    Returns:
        The largest difference of logits.

    Raises:
        Failure: it is beyond the tolerance.
    """
    ids = (ids_BT, ids_BT) if design.hf_config.is_encoder_decoder else (ids_BT,)
    named = design.family.named_inputs(ids)
    x: Tensor | tuple[Tensor, ...] = ids if len(ids) > 1 else ids_BT
    layers = dict(enumerate(design.family.layers(model)))
    subnetwork = Subnetwork(design.family, design.method.shape, layers)
    with subnetwork.active(plan) if plan else nullcontext():
        for piece in design.family.pieces(design.hf_config):
            x = piece.forward(*(model.get_submodule(path) for path in piece.modules), x)
    difference = (reloaded(**named).logits.float() - x.float()).abs().max().item()
    if not difference <= TOLERANCE[design.config.precision]:
        raise Failure(
            f"the reloaded folder's logits differ by {difference} from those of the engine's "
            f"weights; nothing was exported"
        )
    return difference
