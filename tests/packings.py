"""Texts to pack, and packings in small steps, for the tests that pack."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import ROOT

from data_prep.__main__ import main

# The command line in a process of its own, in pieces of a few documents, committed after each.
SMALL_STEPS = """
import sys
import data_prep.pack, data_prep.packing, data_prep.readers.delimited
data_prep.pack.PIECE_BYTES = data_prep.readers.delimited.PIECE_BYTES = 10_000
data_prep.packing.COMMIT_EVERY_S = 0.0
from data_prep.__main__ import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def texts():
    """Texts of many lengths, of real code."""
    code = (ROOT / "est_ds" / "config.py").read_text()
    draws = random.Random(0)
    return [
        f"{number}{code[begin:][: draws.choice([5, 50, 500, 5000])]}"
        for number in range(400)
        for begin in [draws.randrange(len(code) // 2)]
    ]


@pytest.fixture(scope="session")
def source(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for number in range(4):
        lines = [json.dumps({"text": t}) + "\n" for t in texts[100 * number : 100 * number + 100]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def small_steps(tmp_path):
    script = tmp_path / "small_steps.py"
    script.write_text(SMALL_STEPS)
    return script


def files_of(prefix):
    """Contents by ending of all files of a corpus, or of its parts."""
    prefix = Path(prefix)
    found = {p.name.removeprefix(prefix.name): p for p in prefix.parent.glob(f"{prefix.name}*")}
    return {ending: path.read_bytes() for ending, path in found.items()}


def pack_arguments(source, tokenizer, out, *more):
    arguments = ("pack", "--input", source, "--tokenizer", tokenizer, "--out", out, *more)
    return [str(argument) for argument in arguments]


def pack(*arguments):
    assert main(pack_arguments(*arguments)) == 0
