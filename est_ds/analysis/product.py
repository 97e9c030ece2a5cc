"""Products of a Hessian with vectors, and the vectors of Hutchinson's estimate.

Shapes: a vector is a list of tensors, one a parameter, each as large as it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import grad

from est_ds.analysis.subject import Subject
from est_ds.design import Design
from est_ds.plans import draw
from est_ds.slicing.build import embedding_names
from est_ds.slicing.families.base import layer_paths

SIGNS = 0x68657373  # kind of the draws, apart from those of plans and data


class Hessian:
    """The Hessian of the mean held-out loss over all parameters of the full model.

    It is never built: a product with a vector is the gradient of (gradient x vector), by two
    backward passes over every batch.

    Attributes:
        parameters: of the model, a tied one once.
        products: taken so far.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.parameters = [p for p in subject.model.parameters() if p.requires_grad]
        self.products = 0

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def times(self, vector: list[Tensor]) -> list[Tensor]:
        """Returns the product with a vector."""
        self.products += 1
        total = [torch.zeros_like(p) for p in self.parameters]
        for batch in self._subject.batches:
            loss = self._subject.loss(batch)
            gradient = grad(loss, self.parameters, create_graph=True, allow_unused=True)
            along = torch.stack(
                [(g * v).sum() for g, v in zip(gradient, vector) if g is not None]
            ).sum()
            # A parameter on which no gradient depends has None.
            for sum_, part in zip(total, grad(along, self.parameters, allow_unused=True)):
                if part is not None:
                    sum_ += part
        return total

    def signs(self, seed: int, sample: int) -> list[Tensor]:
        """Returns the vector of a sample: random signs, a function of seed and sample alone."""
        return [
            torch.from_numpy(_signs(seed, sample, i, p.numel())).view(p.shape).to(p.device)
            for i, p in enumerate(self.parameters)
        ]


def _signs(seed: int, sample: int, parameter: int, count: int) -> np.ndarray:
    """Independent even signs, float32 [count]; a key gives 32 of them."""
    keys = draw.keys(seed, SIGNS, parameter, sample, -(-count // 32))
    bits = np.unpackbits(keys.view(np.uint8))[:count]
    return bits.astype(np.float32) * 2 - 1


def groups_of(design: Design, model: nn.Module) -> dict[str, list[int]]:
    """Returns which parameters belong together, by their place in `model.parameters()`.

    Returns:
        `embeddings` (with a head that is tied to them), `layer 0`, `layer 1`, ..., and `output`:
        what else there is, the last norm and a head of its own.
    """
    layers, embeddings = layer_paths(design.family.pieces(design.hf_config)), embedding_names(model)
    found: dict[str, list[int]] = {name: [] for name in ("embeddings", *_titles(layers), "output")}
    for place, (name, _) in enumerate(model.named_parameters()):
        own = [f"layer {i}" for i, path in layers.items() if name.startswith(path)]
        group = own[0] if own else "embeddings" if name in embeddings else "output"
        found[group].append(place)
    return {name: places for name, places in found.items() if places}


def _titles(layers: dict[int, str]) -> list[str]:
    return [f"layer {i}" for i in sorted(layers)]


def flat(vector: list[Tensor]) -> np.ndarray:
    """Returns a vector as an array, float32 [size]."""
    return torch.cat([part.detach().flatten().cpu() for part in vector]).numpy()


def unflat(values: np.ndarray, like: list[Tensor]) -> list[Tensor]:
    """Returns an array as a vector."""
    whole = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
    parts = whole.split([math.prod(p.shape) for p in like])
    return [part.view(p.shape).to(p.device) for part, p in zip(parts, like)]
