"""Builds Hugging Face models: empty for planning, or initialised alike in every layout."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from est_ds.cost.parameters import PieceSize
from est_ds.slicing.families import family_of


def empty_model(config: Any) -> nn.Module:
    """The unmodified Hugging Face model of `config` with empty (meta) weights."""
    import transformers
    from accelerate import init_empty_weights

    family = family_of(config.model_type)
    auto_class = getattr(transformers, family.auto_class)
    with init_empty_weights(include_buffers=True):
        model = auto_class.from_config(config, attn_implementation=family.attention)
    family.untie(model)
    # Nothing is padded here: the row of `pad_token_id` is a token's like any other, and trains.
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    model.tie_weights()
    return model


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def piece_sizes(model: nn.Module) -> tuple[PieceSize, ...]:
    """Parameters of the pieces of a model, in the order of its family's pieces."""
    found = []
    pieces = family_of(model.config.model_type).pieces(model.config)
    modules = [[model.get_submodule(path) for path in piece.modules] for piece in pieces]
    held = [{id(p): p.numel() for m in piece for p in m.parameters()} for piece in modules]
    times = Counter(key for piece in held for key in piece)
    for piece, sizes in zip(pieces, held):
        shared = {str(key): count for key, count in sizes.items() if times[key] > 1}
        own = sum(sizes.values()) - sum(shared.values())
        found.append(PieceSize(piece.layer, own, shared))
    return tuple(found)


def embedding_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that are embeddings; of tied ones the name that they share."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    held = {id(parameter) for module in embeddings for parameter in module.parameters()}
    return frozenset(name for name, p in model.named_parameters() if id(p) in held)


def allocate(model: nn.Module, paths: Iterable[str]) -> None:
    """Gives the submodules at `paths` memory for weights that are read later, and their buffers.

    What lies in that memory is nobody's; until it is written the system does not count it.

    Args:
        model: a model with empty weights.
        paths: see `initialise`.
    """
    for path in paths:
        _allocate(model, path)
        _tie(model, path, lambda owner: _allocate(model, owner))


def initialise(
    model: nn.Module, paths: Iterable[str], seed: int, residual_std: float | None = None
) -> None:
    """Gives the submodules at `paths` real weights, drawn as Hugging Face draws them.

    Every module's draw is addressed by (seed, its path), so that a pipe stage that builds three
    layers gets the weights that a process building the whole model has there. A tied parameter
    is drawn at the address of the one that it is tied to, which need not be among `paths`.

    Args:
        model: a model with empty weights.
        paths: paths of submodules; "" is the whole model.
        residual_std: width of the projections that write into the residual stream; None: as
            Hugging Face draws them.
    """
    for path in paths:
        _draw(model, path, seed)
        if residual_std is not None:
            _draw_projections(model, path, seed, residual_std)
        # After the draw above, which wrote into a parameter that was tied already.
        _tie(model, path, lambda owner: _draw(model, owner, seed))


def _tie(model: nn.Module, path: str, fill: Callable[[str], None]) -> None:
    """Ties what is under `path` and tied.

    Args:
        fill: gives the module at a path, which owns what others are tied to, its weights.
    """
    tied = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if not path or target.startswith(f"{path}.")
    }
    for owner in {source.rpartition(".")[0] for source in tied.values()}:
        fill(owner)
    for target, source in tied.items():
        owner, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))


def _allocate(model: nn.Module, path: str) -> None:
    from transformers import PreTrainedModel

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for module in _materialised(model.get_submodule(path)):
            if module._buffers and not isinstance(module, PreTrainedModel):
                model._init_weights(module)


def _materialised(root: nn.Module) -> list[nn.Module]:
    """All modules under `root`, which have memory afterwards."""
    found = list(root.modules())
    for module in found:
        if any(t.is_meta for t in [*module.parameters(False), *module.buffers(False)]):
            module.to_empty(device="cpu", recurse=False)
    return found


def _draw(model: nn.Module, path: str, seed: int) -> None:
    from transformers import PreTrainedModel

    root, family = model.get_submodule(path), family_of(model.config.model_type)
    _materialised(root)
    found = [(f"{path}.{name}".strip("."), m) for name, m in root.named_modules()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, module in reversed(found):  # children before parents, as the library does
            if isinstance(module, PreTrainedModel):
                # A whole model at most draws its embedding again, as T5 does at the same scale;
                # a stage that holds a part of the model could not repeat that.
                continue
            _seed_for(seed, name)
            model._init_weights(module)
            family.rescale_drawn(model.config, name, module)


def _draw_projections(model: nn.Module, path: str, seed: int, std: float) -> None:
    """Draws the projections into the residual stream that are under `path`, each at its address."""
    family = family_of(model.config.model_type)
    slots = [slot for layer in family.layers(model) for slot in family.slots(layer)]
    projections = {module for slot in slots for module, _ in slot.columns}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, module in model.get_submodule(path).named_modules():
            if module in projections:
                _seed_for(seed, f"{path}.{name}".strip("."))
                module.weight.normal_(0.0, std)


def _seed_for(seed: int, name: str) -> None:
    """Seeds torch's generator for the draw of a module."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def build_model(config: Any, seed: int) -> nn.Module:
    """The whole model, drawn as Hugging Face draws it."""
    model = empty_model(config)
    initialise(model, [""], seed)
    return model
