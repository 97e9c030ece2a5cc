"""Kinds of values that options of the command line take."""

from __future__ import annotations

import argparse
import math


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


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def several_above_zero(text: str) -> tuple[float, ...]:
    """Numbers above 0, as `1e-4,2e-4`."""
    return tuple(dict.fromkeys(above_zero(part) for part in text.split(",")))


def several_naturals(text: str) -> tuple[int, ...]:
    """Whole numbers, as `0,1,2`."""
    return tuple(dict.fromkeys(natural(part) for part in text.split(",")))
