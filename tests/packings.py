"""Texts to pack, and packings in small steps, for the tests that pack."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from data_prep.__main__ import main


class SmallSteps:
    """The command line in a process of its own, in pieces of a few documents, committed after each.

    It is forked from this process, which has imported what takes long; the workers that it starts
    are spawned, as always.
    """

    def __init__(self, arguments, folder):
        self._files = [folder / name for name in ("stdout", "stderr")]
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._run, args=(arguments,))
        self.process.start()

    def _run(self, arguments):
        import data_prep.pack
        import data_prep.packing
        import data_prep.readers.delimited

        sys.stdout, sys.stderr = (file.open("w") for file in self._files)
        data_prep.pack.PIECE_BYTES = data_prep.readers.delimited.PIECE_BYTES = 10_000
        data_prep.packing.COMMIT_EVERY_S = 0.0
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def workers(self):
        """Ids of the processes that it started to tokenize."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        ids = [Path("/proc", child, "cmdline") for child in children.read_text().split()]
        return [int(file.parent.name) for file in ids if b"spawn_main" in file.read_bytes()]

    def end(self):
        """Waits for it; returns exit code, standard output and error."""
        self.process.join()
        return self.process.exitcode, *(file.read_text() for file in self._files)


@pytest.fixture(scope="session")
def texts():
    """Texts of many lengths, of real code."""
    code = (ROOT / "est_ds" / "config" / "sections.py").read_text()
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
