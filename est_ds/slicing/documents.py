"""Attention of documents that lie in one sequence, each computed by itself.

In place of a mask [B, 1, T, T] a layer is given the number of the document of every position,
int32 [B, 1, T, 1]; the library hands it on as it does a mask of four dimensions. The attention that
is registered with the library here finds in it where documents begin. On a GPU one kernel of
FlashAttention takes all of them (`torch.nn.attention.varlen`). On a CPU every document is a call of
SDPA, but short neighbours share one, with a small mask; where masks of whole sequences take less
time than so many calls, they are used.

Shapes: B sequences, T positions of each that pass through the layer, N = B * T, H query heads,
G key/value heads, D width of a head, E documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

NAME = "est_documents"
# On a CPU: positions of short documents that a call takes, and the masked scores that one thread
# computes in the time that a call takes by itself (0.3 ms with its backward, 10 ns a score).
TOGETHER, SCORES_OF_CALL = 64, 30_000


def attend_by_document(model: nn.Module) -> None:
    """Has a model of the library compute attention document by document, where it is given the
    numbers of documents as its mask; given anything else it does what SDPA does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def has_kernel() -> bool:
    """Whether FlashAttention runs on this process's GPU: NVIDIA's from Ampere on."""
    return (
        torch.version.cuda is not None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability() >= (8, 0)
    )


def numbers_of(positions_BT: Tensor) -> Tensor:
    """The numbers of documents, int32 [B, 1, T, 1], of the positions of the ids in theirs."""
    return (positions_BT == 0).cumsum(-1, dtype=torch.int32)[:, None, :, None]


def are_numbers(mask: Tensor | None) -> bool:
    """Whether that, given as a mask, is the numbers of documents."""
    return mask is not None and mask.dtype == torch.int32


@dataclass(frozen=True)
class Reach:
    """What of its document a position sees.

    Attributes:
        causal: itself and those before it only.
        window: of these the nearest so many only, itself among them; None: all.
    """

    causal: bool
    window: int | None


class Documents:
    """Where documents lie among the positions of all sequences, which follow each other.

    Args:
        numbers_BT: of documents, different ones in a sequence.

    Attributes:
        bounds_E1: where documents begin, and N: int32 [E + 1].
        longest: positions that no document has more of.
    """

    def __init__(self, numbers_BT: Tensor) -> None:
        self._numbers_BT = numbers_BT
        begins_BT = torch.ones_like(numbers_BT, dtype=torch.bool)
        begins_BT[:, 1:] = numbers_BT[:, 1:] != numbers_BT[:, :-1]
        begins_E = begins_BT.flatten().nonzero().flatten()
        self.bounds_E1 = pad(begins_E, (0, 1), value=numbers_BT.numel()).int()
        self.longest = numbers_BT.shape[1]
        self._masks: dict[Reach, list[Tensor | None]] = {}
        self._whole: dict[Reach, Tensor] = {}

    @classmethod
    def of(cls, numbers_B1T1: Tensor) -> Documents:
        """Those that a tensor numbers, found once for all layers that are given it."""
        kept = numbers_B1T1.__dict__
        if "est_documents" not in kept:
            kept["est_documents"] = cls(numbers_B1T1[:, 0, :, 0])
        return kept["est_documents"]

    @cached_property
    def stretches(self) -> list[list[int]]:
        """The lengths of the documents that a call on a CPU takes, of every call."""
        found: list[list[int]] = []
        for length in self.bounds_E1.diff().tolist():
            if found and sum(found[-1]) + length <= TOGETHER:
                found[-1].append(length)
            else:
                found.append([length])
        return found

    def masked_is_faster(self, heads: int) -> bool:
        """Whether a CPU computes all scores in less time than the calls of all stretches take."""
        calls = len(self.stretches) * torch.get_num_threads()
        return self._numbers_BT.numel() * self.longest * heads < calls * SCORES_OF_CALL

    def mask(self, reach: Reach) -> Tensor:
        """Which positions see which, bool [B, 1, T, T]."""
        if reach not in self._whole:
            same = self._numbers_BT[:, None, :, None] == self._numbers_BT[:, None, None, :]
            self._whole[reach] = same & _in_reach(self.longest, reach).to(same.device)
        return self._whole[reach]

    def masks(self, reach: Reach) -> list[Tensor | None]:
        """The mask of every stretch, made once for all layers."""
        if reach not in self._masks:
            self._masks[reach] = [_mask(lengths, reach) for lengths in self.stretches]
        return self._masks[reach]


def _mask(lengths: list[int], reach: Reach) -> Tensor | None:
    """Which positions of documents see which, bool [n, n]; None where SDPA's own flag says it."""
    total = sum(lengths)
    if len(lengths) == 1 and (reach.window is None or total <= reach.window):
        return None
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return (number[:, None] == number) & _in_reach(total, reach)


def _in_reach(positions: int, reach: Reach) -> Tensor:
    """Which of neighbouring positions see which, were they of one document, bool [n, n]."""
    back = torch.arange(positions)[:, None] - torch.arange(positions)
    seen = back >= 0 if reach.causal else torch.ones_like(back, dtype=torch.bool)
    return seen if reach.window is None else seen & (back < reach.window)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """Attention as the library calls it: query [B, H, T, D], key and value [B, G, T, D] to
    [B, T, H, D].

    Args:
        mask: the numbers of documents, or any mask.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not are_numbers(mask):
        return sdpa_attention_forward(module, query, key, value, mask, **named)
    assert not named.get("dropout"), "weights of attention are dropped under masks only"
    documents, window = Documents.of(mask), named.get("sliding_window")
    if window is not None and window >= documents.longest:
        window = None
    reach = Reach(module.is_causal, window)
    if not query.is_cuda and documents.masked_is_faster(query.shape[1]):
        whole = documents.mask(reach)
        return sdpa_attention_forward(module, query, key, value, whole, **named)
    states = tuple(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    compute = _in_one_kernel if query.is_cuda else _one_by_one
    result = compute(states, documents, reach, named.get("scaling"))
    return result.unflatten(0, (query.shape[0], -1)), None


States = tuple[Tensor, Tensor, Tensor]  # q [N, H, D], k and v [N, G, D]


def _one_by_one(states: States, documents: Documents, reach: Reach, scale: float | None) -> Tensor:
    """The result [N, H, D] on a CPU."""
    masks, found = documents.masks(reach), []
    lengths = [sum(stretch) for stretch in documents.stretches]
    grouped = states[0].shape[1] != states[1].shape[1]
    for *stretch, mask in zip(*(x.split(lengths) for x in states), masks):
        result = scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in stretch),
            attn_mask=None if mask is None else mask[None, None],
            is_causal=reach.causal and mask is None,
            scale=scale,
            enable_gqa=grouped,
        )
        found.append(result[0].transpose(0, 1))
    return torch.cat(found)


def _in_one_kernel(
    states: States, documents: Documents, reach: Reach, scale: float | None
) -> Tensor:
    """The result [N, H, D] on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    before = -1 if reach.window is None else reach.window - 1
    return varlen_attn(
        *states,
        documents.bounds_E1,
        documents.bounds_E1,
        documents.longest,
        documents.longest,
        scale=scale,
        window_size=(before, 0 if reach.causal else -1),
        enable_gqa=states[0].shape[1] != states[1].shape[1],
    )
