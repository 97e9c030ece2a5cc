"""Copies layers, with their optimizer state, inside a running engine.

Works on the full tensors of a layer, whatever ZeRO and the pipeline have cut: they are summed up
over all processes. What a process is to write waits in host memory until all is read: 12 bytes for
every parameter of its new layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from est_ds.design import Design
from est_ds.engine.fragments import Fragments
from est_ds.plans.growth import Growth
from est_ds.slicing.build import empty_model
from est_ds.slicing.families.base import layer_paths

ParameterState = dict[str, Tensor]  # by `Fragments.keys`


def grow(fragments: Fragments, design: Design, growth: Growth) -> None:
    """Carries out a growth. Every process calls it.

    A layer whose moments are zero begins to count its steps; one that takes over the moments of
    another takes over its count too.
    """
    paths = layer_paths(design.family.pieces(design.hf_config))
    model = empty_model(design.hf_config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    taken: dict[str, ParameterState] = {}
    for layer in growth.new:
        if any(name.startswith(paths[layer]) for name in fragments.shapes):
            _draw_layer(model, design, paths[layer], growth.new_are_identity)
            for name in (n for n in shapes if n.startswith(paths[layer])):
                weight = model.get_parameter(name).detach().float()
                zeros = {key: torch.zeros_like(weight) for key in fragments.keys}
                taken[name] = zeros | {"weight": weight}
    for target, source in sorted(growth.copies.items()):
        for name in (n for n in shapes if n.startswith(paths[source])):
            state = fragments.gather(name, shapes[name])
            if target in growth.without_moments:
                for key in fragments.keys[1:]:
                    state[key].zero_()
            own = paths[target] + name.removeprefix(paths[source])
            if own in fragments.shapes:
                taken[own] = {key: tensor.cpu() for key, tensor in state.items()}
    births = _births(fragments, paths, growth)
    # Only now: a layer that is written may have been another's source.
    with torch.no_grad():
        for fragment in fragments.held():
            for key, tensor in taken.get(fragment.name, {}).items():
                fragment.states[key].copy_(tensor.flatten()[fragment.start : fragment.stop])
    fragments.commit(fragments.optimizer_steps, births)


def _births(fragments: Fragments, paths: dict[int, str], growth: Growth) -> dict[str, int]:
    """What `Fragments.births` are after a growth."""
    births = dict(fragments.births)
    for layer in growth.new:
        births[paths[layer]] = fragments.optimizer_steps
    for layer, source in growth.copies.items():
        inherited = fragments.births.get(paths[source], 0)
        begins = layer in growth.without_moments
        births[paths[layer]] = fragments.optimizer_steps if begins else inherited
    return {path: step for path, step in births.items() if step}


def _draw_layer(model: nn.Module, design: Design, path: str, is_identity: bool) -> None:
    """Gives a layer of an empty model the weights of the start of the run.

    Args:
        path: what the names of the layer's parameters begin with.
        is_identity: its output projections are zero, so that the model computes what it did
            without the layer; their gradients are not zero.
    """
    design.draw(model, [path.removesuffix(".")])
    if is_identity:
        slots = design.family.slots(model.get_submodule(path.removesuffix(".")))
        outputs = [module for slot in slots for module, _ in slot.columns]
        with torch.no_grad():
            for parameter in (p for module in outputs for p in module.parameters()):
                parameter.zero_()
