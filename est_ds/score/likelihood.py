"""Log-likelihoods of texts: after a context, as lm-eval has them; or within one, of a masked model.

Shapes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

_LOGITS_AT_ONCE = 1 << 26
Ids = tuple[int, ...]


class Scorer:
    """Computes log-likelihoods with an exported model.

    Args:
        model: a causal or a masked language model of transformers.
        tokenizer: its own.
        positions: tokens that the model takes; None: any number.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, positions: int | None) -> None:
        self._model, self._tokenizer, self._positions = model, tokenizer, positions
        first = tokenizer("a")["input_ids"][:1]
        self._before = tuple(first) if first == [tokenizer.bos_token_id] else ()

    def after(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Returns the log-likelihood of every continuation after its context, nats.

        Spaces at the end of a context belong to the continuation; of what is too long the left is
        cut, as lm-eval does.
        """
        requests = []
        for context, continuation in pairs:
            ids, length = self._encoded(context, continuation)
            if self._positions is not None:
                ids = ids[-(self._positions + 1) :]
            assert 0 < length < len(ids), "a continuation has tokens, and one before them"
            places = tuple(range(len(ids) - 1 - length, len(ids) - 1))
            requests.append((ids[:-1], places, ids[-length:]))
        return self._sums(requests)

    def within(self, texts: Sequence[tuple[str, str, str]]) -> list[float]:
        """Returns the log-likelihood of the middle of every (before, middle, after), nats: the sum
        over its tokens, each masked together with the others, given both sides."""
        requests = []
        for before, middle, after in texts:
            encoded = self._tokenizer(before + middle + after, return_offsets_mapping=True)
            ids, begin, end = encoded["input_ids"], len(before), len(before + middle)
            spans = enumerate(encoded["offset_mapping"])
            places = tuple(i for i, (a, b) in spans if a < end and b > begin and b > a)
            targets = tuple(ids[i] for i in places)
            for i in places:
                ids[i] = self._tokenizer.mask_token_id
            requests.append((tuple(ids), places, targets))
        return self._sums(requests)

    def num_tokens(self, text: str) -> int:
        """Returns how many tokens a text has by itself."""
        return len(self._plain(text))

    def _encoded(self, context: str, continuation: str) -> tuple[Ids, int]:
        """The ids of both together, and how many of them are the continuation's."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole = self._before + self._plain(context + continuation)
        return whole, len(whole) - len(self._before + self._plain(context))

    def _plain(self, text: str) -> Ids:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _sums(self, requests: Iterable[tuple[Ids, Ids, Ids]]) -> list[float]:
        """Sums of log-probabilities.

        Args:
            requests: inputs, places whose logits count, and the ids that these predict.
        """
        requests = list(requests)
        at_once = _LOGITS_AT_ONCE // self._model.config.vocab_size
        different = sorted({ids for ids, _, _ in requests}, key=lambda ids: (len(ids), ids))
        asked: dict[Ids, list[int]] = {}
        for i, (ids, _, _) in enumerate(requests):
            asked.setdefault(ids, []).append(i)
        found = [0.0] * len(requests)
        while different:
            longest = len(different[-1])
            rows = different[-max(1, at_once // longest) :]
            del different[-len(rows) :]
            for ids, log_p_TV in zip(rows, self._log_probabilities(rows)):
                for i in asked[ids]:
                    _, places, targets = requests[i]
                    found[i] = log_p_TV[list(places), list(targets)].double().sum().item()
        return found

    @torch.no_grad()
    def _log_probabilities(self, rows: Sequence[Ids]) -> torch.Tensor:
        longest = max(map(len, rows))
        ids_BT = torch.tensor([ids + (0,) * (longest - len(ids)) for ids in rows])
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows])
        given = {"input_ids": ids_BT.to(self._model.device)}
        given |= {"attention_mask": mask_BT.to(self._model.device)}
        logits_BTV = self._model(**given, use_cache=False).logits
        return logits_BTV.float().log_softmax(-1).cpu()
