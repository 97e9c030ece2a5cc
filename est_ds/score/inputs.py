"""Examples of a task as inputs of a classifier."""

from __future__ import annotations

from typing import Any

from est_ds.errors import UserError
from est_ds.score.tasks import Examples


def fill_up_with(tokenizer: Any) -> None:
    """Gives a tokenizer a padding token if it has none: EOS, or else UNK; it goes to the right.

    There it moves no position. The head of a causal model reads the last token that is no padding,
    and that of BERT the first.

    Raises:
        UserError: it has none of these.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(
            "data.tokenizer has no token to fill up texts with (PAD, EOS or UNK); use a tokenizer "
            "that has one."
        )


def inputs_of(
    examples: Examples, tokenizer: Any, longest: int, types: bool
) -> list[dict[str, list[int]]]:
    """Returns the inputs of examples, cut to `longest` tokens each.

    Two texts go together as the tokenizer frames them. If it puts nothing between them, its EOS
    stands there.

    Args:
        types: whether the model tells two texts apart by `token_type_ids`.

    Raises:
        UserError: `longest` leaves nothing of a text.
    """
    between = [] if examples.second is None else _between(tokenizer)
    pair = examples.second is not None
    least = tokenizer.num_special_tokens_to_add(pair=pair) + len(between) + 1 + pair
    if longest < least:
        raise UserError(
            f"--tokens={longest} leaves nothing of {'two texts' if pair else 'a text'} beside what "
            f"the tokenizer adds; use {least} or more."
        )
    encoded = tokenizer(
        list(examples.first),
        None if examples.second is None else list(examples.second),
        truncation=True,
        max_length=longest - len(between),
        return_token_type_ids=types,
    )
    rows = []
    for i in range(len(examples)):
        row = {name: list(values[i]) for name, values in encoded.items()}
        if between:
            number = encoded.sequence_ids(i)
            at = number.index(1) if 1 in number else len(number)
            for name, values in row.items():
                values[at:at] = between if name == "input_ids" else values[at - 1 : at]
        rows.append(row)
    return rows


def _between(tokenizer: Any) -> list[int]:
    """EOS, of a tokenizer that puts nothing between two texts."""
    first, second = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a", "b"))
    framed, joined = tokenizer("a", "b")["input_ids"], first + second
    has_nothing = any(framed[i : i + len(joined)] == joined for i in range(len(framed)))
    eos = tokenizer.eos_token_id
    return [eos] if has_nothing and eos is not None else []
