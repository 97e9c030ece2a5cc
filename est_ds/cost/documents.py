"""Which runs compute attention document by document, and which compute all and mask. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from est_ds.config.run_config import RunConfig
from est_ds.plans.shape import Attention, ModelShape

DEFAULT_WINDOW = {"mistral": 4096}
WIDEST_HEAD, WIDTH_STEP = 256, 8  # of FlashAttention's kernels


def window_of(config: RunConfig, family: str) -> int | None:
    """How many positions a layer with a sliding window sees; None where no layer has one."""
    model = config.model
    if not model.get("use_sliding_window", family == "mistral"):
        return None
    return model.get("sliding_window", DEFAULT_WINDOW.get(family)) or None


def of_weights(dropout: Mapping[str, float]) -> set[str]:
    """The fields of a model that drop weights of attention, among those that drop something."""
    return {f for f in dropout if "attn" in f or "attention" in f or f == "dropout_rate"}


def by_document(
    config: RunConfig, shape: ModelShape, dropout: Mapping[str, float], on_gpu: bool
) -> bool:
    """Whether every document's attention is computed by itself, so that scores between documents
    take no time.

    It is not, and the scores between documents are masked, with

    - `compile`, because documents have other lengths in every batch;
    - dropout of the weights of attention, which the kernels lack, or draw otherwise;
    - dropped positions and a sliding window that is shorter than a sequence, which counts them too;
    - fp32 on a GPU, or heads of a width that FlashAttention does not take.

    Args:
        dropout: the fields of the model that drop something, with their chances.
    """
    if config.data.documents != "separate" or config.compile or of_weights(dropout):
        return False
    window = window_of(config, shape.family)
    if window and window < config.data.sequence and config.method["name"] == "token_drop":
        return False
    if not on_gpu:
        return True
    parts = (part for layer in shape.layers for part in layer)
    widths = {part.head_dim for part in parts if isinstance(part, Attention)}
    return config.precision == "bf16" and all(
        width % WIDTH_STEP == 0 and width <= WIDEST_HEAD for width in widths
    )
