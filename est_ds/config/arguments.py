"""Kinds of values that options of the command line take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SEEDS = 2**32  # that NumPy takes, and so transformers


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """A seed: a whole number from 0 on that all generators take."""
    if natural(text) >= SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {SEEDS - 1}")
    return int(text)


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def several(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Values of a kind between commas, as `1e-4,2e-4`, none twice."""

    def values(text: str) -> tuple[T, ...]:
        try:
            return tuple(dict.fromkeys(kind(part) for part in text.split(",")))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a list of numbers such as 1,2"
            ) from None

    return values
