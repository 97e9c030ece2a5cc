"""Copies layers, with their optimizer state, inside a running engine.

Works on the full tensors of a layer, whatever ZeRO and the pipeline have cut: they are summed up
over all processes. What a process is to write waits in host memory until all is read: 12 bytes for
every parameter of its new layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from est_ds.engine.fragments import MOMENTS, Fragments
from est_ds.plans.growth import Growth
from est_ds.slicing.build import empty_model, initialise
from est_ds.slicing.families.base import Family, layer_paths

ParameterState = dict[str, Tensor]  # weight, exp_avg, exp_avg_sq


def grow(fragments: Fragments, hf_config: Any, family: Family, seed: int, growth: Growth) -> None:
    """Carries out a growth. Every process calls it."""
    paths = layer_paths(family.pieces(hf_config))
    shapes = {n: tuple(p.shape) for n, p in empty_model(hf_config).named_parameters()}
    taken: dict[str, ParameterState] = {}
    for layer in growth.new:
        if any(name.startswith(paths[layer]) for name in fragments.shapes):
            taken |= _new_layer(hf_config, family, seed, paths[layer], growth.new_are_identity)
    for target, source in sorted(growth.copies.items()):
        for name in (n for n in shapes if n.startswith(paths[source])):
            state = fragments.gather(name, shapes[name])
            if target in growth.without_moments:
                for key in MOMENTS:
                    state[key].zero_()
            own = paths[target] + name.removeprefix(paths[source])
            if own in fragments.shapes:
                taken[own] = {key: tensor.cpu() for key, tensor in state.items()}
    # Only now: a layer that is written may have been another's source.
    steps = fragments.optimizer_steps
    with torch.no_grad():
        for fragment in fragments.held():
            for key, tensor in taken.get(fragment.name, {}).items():
                fragment.states[key].copy_(tensor.flatten()[fragment.start : fragment.stop])
    fragments.commit(steps)


def _new_layer(
    hf_config: Any, family: Family, seed: int, path: str, is_identity: bool
) -> dict[str, ParameterState]:
    """The state of a layer drawn as at the start of the run, its moments zero.

    Args:
        is_identity: its output projections are zero, so that the model computes what it did; their
            gradients are not.
    """
    model = empty_model(hf_config)
    initialise(model, [path.removesuffix(".")], seed)
    layer = model.get_submodule(path.removesuffix("."))
    outputs = [module for slot in family.slots(layer) for module, _ in slot.columns]
    if is_identity:
        with torch.no_grad():
            for parameter in (p for module in outputs for p in module.parameters()):
                parameter.zero_()
    return {
        path + name: {
            "weight": p.detach().float(),
            **{key: torch.zeros(p.shape) for key in MOMENTS},
        }
        for name, p in layer.named_parameters()
    }
