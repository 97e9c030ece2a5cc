"""The whole model that a checkpoint holds, in one process, whatever layout wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from est_ds.checkpoints.reader import Checkpoint
from est_ds.design import Design
from est_ds.slicing.build import build_model, empty_model


def whole_weights(design: Design, checkpoint: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns all weights of a checkpoint by their Hugging Face names, tied ones under all of them.

    Raises:
        Damaged: a file is missing or unreadable.
    """
    with Checkpoint(checkpoint) as held:
        weights = {name: tensor.to(dtype) for name, tensor in held.weights().items()}
    tied = empty_model(design.hf_config).all_tied_weights_keys
    return weights | {name: weights[source] for name, source in tied.items()}


def with_weights(hf_config: Any, weights: dict[str, Tensor]) -> nn.Module:
    """Returns the library's model with these weights; tied ones are one parameter."""
    model = build_model(hf_config, seed=0)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    return model
