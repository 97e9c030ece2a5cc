"""Command line of data preparation: `python -m data_prep VERB --help`."""

import argparse
import os
import sys
from pathlib import Path

from est_ds.errors import UserError

_KINDS = (
    "files or folders of .txt and .py (one document each) and .jsonl (one document a line, in the "
    'field "text")'
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{self.prog}: {message}; see `{self.prog} --help`.")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m data_prep", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, summary: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=summary, description=summary)

    def paths(to: argparse.ArgumentParser, note: str = "", required: bool = True) -> None:
        to.add_argument(
            "--input", nargs="+", type=Path, metavar="PATH", required=required, help=_KINDS + note
        )

    corpus = verb("corpus", "Gather documents into PREFIX.train.jsonl and PREFIX.valid.jsonl.")
    paths(corpus, "; default: the sources of Python's standard library", required=False)
    corpus.add_argument("--out", required=True, metavar="PREFIX")
    share = "share of the documents that goes into PREFIX.valid.jsonl; default 0.02"
    corpus.add_argument("--held-out", type=float, default=0.02, metavar="FRACTION", help=share)

    tokenizer = verb("tokenizer", "Train a Llama-style sentencepiece BPE tokenizer into a folder.")
    paths(tokenizer)
    tokenizer.add_argument("--out", required=True, type=Path, metavar="DIR")
    size = "number of ids, with 256 bytes and 3 special tokens; default 4096"
    tokenizer.add_argument("--vocab", type=int, default=4096, metavar="N", help=size)
    limit = "train on at most N chunks of about 1000 characters, chosen by hash; default 100000"
    tokenizer.add_argument("--sentences", type=int, default=100_000, metavar="N", help=limit)

    pack = verb("pack", "Tokenize documents into PREFIX.bin, PREFIX.idx and PREFIX.manifest.json.")
    paths(pack)
    model = "folder that holds a sentencepiece tokenizer.model"
    pack.add_argument("--tokenizer", required=True, type=Path, metavar="DIR", help=model)
    pack.add_argument("--out", required=True, metavar="PREFIX")
    threads = "threads; the output does not depend on them; default: all cores"
    pack.add_argument("--workers", type=int, default=_cores(), metavar="N", help=threads)

    verify = verb("verify", "Check a packed corpus against its manifest, byte by byte.")
    verify.add_argument("--out", "--input", dest="prefix", required=True, metavar="PREFIX")
    made_by = "also check that this tokenizer made the corpus"
    verify.add_argument("--tokenizer", type=Path, metavar="DIR", help=made_by)
    return parser


def _run(options: argparse.Namespace) -> None:
    # Each verb imports its own tools: sentencepiece, transformers and deepspeed load slowly.
    if options.verb == "corpus":
        from data_prep.corpus import gather

        gather(options.input, options.out, options.held_out)
    elif options.verb == "tokenizer":
        from data_prep.tokenizer import train

        train(options.input, options.out, options.vocab, options.sentences)
    elif options.verb == "pack":
        from data_prep.pack import pack

        pack(options.input, options.tokenizer, options.out, options.workers)
    else:
        from data_prep.verify import verify

        verify(options.prefix, options.tokenizer)


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; returns 0 when done, 2 for wrong input, 1 for a failure of the system."""
    # Preparation needs no accelerator, and looking for one costs time.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        _run(_parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
