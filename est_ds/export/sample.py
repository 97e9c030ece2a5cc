"""A sample of an exported model: nice to see, and never worth an export."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NEW_TOKENS = 48


def continued(
    model: nn.Module, tokenizer: Any, prompt: str, positions: int | None
) -> tuple[str | None, list[str]]:
    """Continues a prompt, greedily.

    Args:
        positions: tokens that the model can take; None: any number.

    Returns:
        The text, prompt included, or None; and lines that say what was cut or left out.
    """
    try:
        ids, lines = tokenizer(prompt)["input_ids"], []
        if not ids:
            return None, [f"no sample: the prompt {prompt!r} has no token; give another --prompt"]
        new = NEW_TOKENS if positions is None else min(NEW_TOKENS, positions - len(ids))
        if new < 1:
            new = min(NEW_TOKENS, positions // 2)
            lines = [f"sample: of the prompt's {len(ids)} tokens the last {positions - new} fit"]
            ids = ids[new - positions :]
        if new < 1:
            return None, [f"no sample: the model takes {positions} tokens"]
        ids_BT = torch.tensor([ids])
        tokens = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new, do_sample=False
        )
        return tokenizer.decode(tokens[0], skip_special_tokens=True), lines
    except Exception as e:  # whatever the library raises: the model itself is proven by now
        return None, [f"no sample: {type(e).__name__}: {' '.join(str(e).split())[:300]}"]
