"""Dropout whose masks are functions of where they fall, not of what was drawn before.

The library's modules draw masks from torch's generator of their device, in kernels that take no
other. So each of them runs under that generator seeded by the address of its masks, and what the
generator was before is put back. Whether a pass is the first or activation checkpointing's second,
and in which process it runs, makes no difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from est_ds.slicing.families.base import Family
from est_ds.slicing.leaf import swap_class
from est_ds.slicing.subnetwork import Subnetwork


@dataclass(frozen=True)
class Place:
    """Where masks fall.

    Attributes:
        path: of the module in the Hugging Face model, which names its layer too.
        subnetwork: knows the micro-batch that is trained.
    """

    seed: int
    path: str
    subnetwork: Subnetwork

    @property
    def address(self) -> str:
        """Seed, step, index of the micro-batch in the global batch, and path."""
        turn = self.subnetwork.turn
        assert turn is not None, f"{self.path} drops outside of a micro-batch's turn"
        return f"{self.seed}/{turn.step}/{turn.micro_batch}/{self.path}"


class Addressed:
    """A module that draws nothing but the masks of dropout, with their address as the seed."""

    est_place: Place

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if not self.training:
            return super().forward(hidden_states, *args, **kwargs)
        with drawn_at(self.est_place.address, hidden_states.device):
            return super().forward(hidden_states, *args, **kwargs)


@contextmanager
def drawn_at(address: str, device: torch.device) -> Iterator[None]:
    """Within, torch's generator of a device draws what belongs to an address.

    A CPU's takes 32 bits of the hash: two masks of one shape are the same once in 4e9 pairs.
    """
    cuda = device.type == "cuda"
    generator = torch.cuda.default_generators[device.index] if cuda else torch.default_generator
    digest = hashlib.blake2b(address.encode(), digest_size=8).digest()
    former = generator.get_state()
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    try:
        yield
    finally:
        generator.set_state(former)


def address_dropout(model: nn.Module, family: Family, seed: int, subnetwork: Subnetwork) -> None:
    """Has every module of a model that drops something in training draw by address.

    Args:
        model: the whole Hugging Face model, also where this process holds some pieces of it.
        subnetwork: installed on the layers of this process.
    """
    attentions = {a for layer in family.layers(model) for a in family.attentions(layer)}
    for path, module in model.named_modules():
        if module in attentions or isinstance(module, nn.Dropout):
            swap_class(module, Addressed)
            module.est_place = Place(seed, path, subnetwork)
    for path, before in family.reused_dropout.items():
        dropout = model.get_submodule(path)
        for other in before:
            place = Place(seed, f"{path} behind {other}", subnetwork)
            model.get_submodule(other).register_forward_hook(_placing(dropout, place))


def _placing(dropout: nn.Module, place: Place):
    def place_it(*_) -> None:
        dropout.est_place = place

    return place_it
