"""Copies layers, with their optimizer state, inside a running engine.

Works on the full tensors of a layer, whatever ZeRO has sharded: DeepSpeed assembles them over the
replicas, and a pipe stage that needs another stage's layer gets them broadcast. What a process is
to write waits in host memory until all is read: 12 bytes for every parameter of its new layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from est_ds.model import empty_model, initialise
from est_ds.plans.growth import Growth
from est_ds.slicing.families.base import Family

MOMENTS = ("exp_avg", "exp_avg_sq")
LayerState = dict[str, dict[str, Tensor]]  # parameter name -> weight, exp_avg, exp_avg_sq


class LayerStates:
    """Reads and writes weights and moments of the layers that live in this process.

    Args:
        engine: the DeepSpeed engine.
        layers: the layers that live here, by their index.
        owners: for every layer of the model the global rank that holds it in this replica; None
            where every process holds all layers.
        group: the processes of this replica's pipe stages.
    """

    def __init__(
        self,
        engine: Any,
        layers: dict[int, nn.Module],
        owners: list[int] | None = None,
        group: Any | None = None,
    ) -> None:
        self._engine, self._layers = engine, layers
        self._owners, self._group = owners, group

    def grow(self, growth: Growth, fresh: dict[int, LayerState]) -> None:
        """Carries out a growth. Every process calls it.

        Args:
            fresh: the states of the fresh layers that live here.
        """
        self._link_moments()
        taken: dict[int, LayerState] = dict(fresh)
        for target, source in sorted(growth.copies.items()):
            state = self._fetch(source)
            if target not in self._layers:
                continue
            if target in growth.without_moments:
                for tensors in state.values():
                    for key in MOMENTS:
                        tensors[key].zero_()
            taken[target] = {
                name: {key: tensor.cpu() for key, tensor in tensors.items()}
                for name, tensors in state.items()
            }
        # Only now: a layer that is written may have been another's source.
        for target, state in taken.items():
            self._write(target, state)

    def _link_moments(self) -> None:
        """Lets DeepSpeed's accessors find the moments of every parameter group.

        It links them once, after the first group's first step, when the other groups have none.
        """
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def _fetch(self, layer: int) -> LayerState:
        """The state of a layer, wherever in this replica it lives."""
        here = self._layers.get(layer)
        if here is not None:
            state = {name: self._read(p) for name, p in here.named_parameters()}
        else:
            # All layers have the same shapes.
            like = next(iter(self._layers.values()))
            state = {
                name: {
                    key: torch.empty(p.shape, dtype=torch.float32, device=p.device)
                    for key in ("weight", *MOMENTS)
                }
                for name, p in like.named_parameters()
            }
        if self._owners is not None:
            for tensors in state.values():
                for tensor in tensors.values():
                    dist.broadcast(tensor, src=self._owners[layer], group=self._group)
        return state

    def _read(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if hasattr(parameter, "_hp_mapping"):
            state = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            return {"weight": safe_get_full_fp32_param(parameter), **state}
        held = self._engine.optimizer.state[parameter]
        state = {key: held[key].clone() for key in MOMENTS}
        return {"weight": parameter.detach().clone(), **state}

    @torch.no_grad()
    def _write(self, layer: int, state: LayerState) -> None:
        for name, parameter in self._layers[layer].named_parameters():
            tensors = {key: t.to(parameter.device) for key, t in state[name].items()}
            parameter.copy_(tensors["weight"])
            if hasattr(parameter, "_hp_mapping"):
                safe_set_full_fp32_param(parameter, tensors["weight"])
                for key in MOMENTS:
                    safe_set_full_optimizer_state(parameter, tensors[key], key)
            else:
                for key in MOMENTS:
                    self._engine.optimizer.state[parameter][key].copy_(tensors[key])


def identity_layers(
    hf_config: Any, family: Family, seed: int, layers: list[int]
) -> dict[int, LayerState]:
    """States of layers that compute the identity: output projections zero, moments zero.

    All else is drawn as at the start of the run (arXiv 2511.04981 trains such layers at once,
    since the gradients of the zero projections are not zero).
    """
    model = empty_model(hf_config)
    paths = {p.layer: p.modules[0] for p in family.pieces(hf_config) if p.layer is not None}
    states: dict[int, LayerState] = {}
    for i in layers:
        initialise(model, [paths[i]], seed)
        layer = model.get_submodule(paths[i])
        with torch.no_grad():
            for slot in family.slots(layer):
                for module, _ in slot.columns:
                    for parameter in module.parameters():
                        parameter.zero_()
        states[i] = {
            name: {
                "weight": p.detach().float(),
                **{key: torch.zeros(p.shape) for key in MOMENTS},
            }
            for name, p in layer.named_parameters()
        }
    return states
