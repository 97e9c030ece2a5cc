"""The slice of the slow tests that continuous integration runs for a commit.

A commit's hash chooses one of `SLICES`, and the order of its tests: over some commits every test
runs, also where the time is over before the last test of a slice.
"""

from __future__ import annotations

from hashlib import sha256

SLICES = 16


def slice_of(commit: str) -> int:
    """Returns the slice that a commit chooses."""
    return _number(commit) % SLICES


def chosen(tests: list[str], commit: str) -> list[str]:
    """Returns those of the tests that run for a commit, in their order."""
    some = [test for test in tests if _number(test) % SLICES == slice_of(commit)]
    return sorted(some, key=lambda test: _number(commit + test))


def _number(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")
