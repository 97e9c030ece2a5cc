"""A subnetwork as a smaller Hugging Face model of its own, with the rescaling in its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from est_ds.errors import UserError
from est_ds.plans.plan import Plan
from est_ds.plans.shape import Attention, ModelShape
from est_ds.slicing.families.base import Family, SubnetworkSize, layer_paths
from est_ds.slicing.leaf import Held, Leaf
from est_ds.slicing.subnetwork import Subnetwork


@torch.no_grad()
def smaller_model(
    model: nn.Module, family: Family, config: Any, plan: Plan
) -> tuple[Any, dict[str, Tensor]]:
    """What the full model computes under a plan, as a model that has nothing else.

    Output projections are multiplied by n / k and by the layer's scale, their biases by the
    layer's scale alone, as under the plan.

    Args:
        model: the full model.
        config: its Hugging Face config.

    Returns:
        Config and weights by name.

    Raises:
        UserError: a config of this family cannot express the subnetwork.
    """
    shape = family.shape(config)
    small = _smaller_config(family, config, _size(plan, shape))
    own, target = (layer_paths(family.pieces(c)) for c in (config, small))
    layers = family.layers(model)
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(tuple(own.values()))
    }
    subnetwork = Subnetwork(family, shape, dict(enumerate(layers)))
    with subnetwork.active(plan):
        for place, i in enumerate(plan.kept_layers):
            for name, tensor in _kept_weights(layers[i]).items():
                weights[target[place] + name] = tensor
        weights |= family.carried_over(layers, plan)
    subnetwork.uninstall()
    return small, {name: tensor.contiguous() for name, tensor in weights.items()}


def _kept_weights(layer: nn.Module) -> dict[str, Tensor]:
    weights = layer.state_dict()
    for path, module in layer.named_modules():
        if isinstance(module, Leaf | Held) and module.est_slice is not None:
            for name, tensor in module.est_parameters().items():
                weights[f"{path}.{name}"] = tensor
    return weights


def _size(plan: Plan, shape: ModelShape) -> SubnetworkSize:
    """The numbers of a plan that keeps as many units in every layer.

    Raises:
        UserError: it does not.
    """
    first: dict[str, tuple[int, int]] = {}
    for i in plan.kept_layers:
        for kept, part in zip(plan.layers[i].parts, shape.layers[i]):
            if isinstance(part, Attention):
                groups = (
                    part.key_value_groups
                    if kept.key_value_groups is None
                    else len(kept.key_value_groups)
                )
                counts = {"heads": kept.count, "key/value heads": groups}
            else:
                counts = {"columns": kept.count}
            if not kept.count:
                raise UserError(
                    f"the plan skips the attention or the MLP of layer {i} and keeps the other, "
                    f"which a Hugging Face model cannot; choose another plan, or --layers, --heads "
                    f"and --columns."
                )
            for what, count in counts.items():
                layer, expected = first.setdefault(what, (i, count))
                if count != expected:
                    raise UserError(
                        f"layer {layer} keeps {expected} {what} and layer {i} keeps {count}: a "
                        f"Hugging Face model has the same number in every layer; choose another "
                        f"plan, or --layers, --heads and --columns."
                    )
    if not plan.kept_layers:
        raise UserError("a model needs at least one layer; choose --layers.")
    counts = (first.get(what, (0, 0))[1] for what in ("heads", "key/value heads", "columns"))
    return SubnetworkSize(plan.kept_layers, *counts)


def _smaller_config(family: Family, config: Any, size: SubnetworkSize) -> Any:
    attention = family.shape(config).layers[0][0]
    if family.head_size_from and size.heads != attention.heads:
        raise UserError(
            f"model_type {config.model_type!r}: heads cannot be cut ({size.heads} of "
            f"{attention.heads} are kept), since Hugging Face derives the width of a head from "
            f"{family.head_size_from}; layers and columns can: use --layers and --columns."
        )
    fields = family.resized(config, size)
    try:
        small = type(config).from_dict({**config.to_dict(), **fields})
    except Exception as e:  # whatever the library raises for values that do not fit
        raise UserError(
            f"Hugging Face refuses {config.model_type} with {fields}: {' '.join(str(e).split())} "
            f"Keep other numbers."
        ) from None
    small._attn_implementation = config._attn_implementation
    return small
