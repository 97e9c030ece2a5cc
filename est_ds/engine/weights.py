"""Reads the weights of a checkpoint without an engine, for any layout that wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from est_ds.engine.checkpoint import INDEX, check_files
from est_ds.slicing.families.base import Piece


def read_weights(checkpoint: Path, pieces: list[Piece]) -> dict[str, Tensor]:
    """All weights, by their Hugging Face names, on the CPU.

    Raises:
        UserError: a file is missing or truncated.
    """
    check_files(checkpoint)
    layout = json.loads((checkpoint / INDEX).read_text())["layout"]
    if layout["pipe"] == 1:
        return _load(checkpoint / "mp_rank_00_model_states.pt")["module"]
    weights: dict[str, Tensor] = {}
    for i, piece in enumerate(pieces):
        weights |= piece_weights(checkpoint, i, piece)
    return weights


def piece_weights(checkpoint: Path, index: int, piece: Piece) -> dict[str, Tensor]:
    """The weights of one piece of a pipeline, by their Hugging Face names."""
    held = _load(checkpoint / f"layer_{index:02d}-model_states.pt")
    named = {}
    for name, tensor in held.items():
        _, position, rest = name.split(".", 2)  # held.0.self_attn.q_proj.weight
        named[f"{piece.modules[int(position)]}.{rest}"] = tensor
    return named


def _load(file: Path) -> dict:
    # Files of our own run: DeepSpeed puts more than tensors into them.
    return torch.load(file, map_location="cpu", weights_only=False)
