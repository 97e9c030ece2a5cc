"""Command line of data preparation: `python -m data_prep VERB --help`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from est_ds.errors import Failure, UserError

_KINDS = (
    "files, folders and globs of .txt and .py (one document each), .jsonl, .jsonl.gz and "
    ".jsonl.zst (one document a line) and .parquet (one a row)"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{self.prog}: {message}; see `{self.prog} --help`.")


_SHARE = "share of the documents, by hash of their text, that goes into a part of its own"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m data_prep", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, summary: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=summary, description=summary)

    corpus = verb("corpus", "Gather documents into PREFIX.train.jsonl and PREFIX.valid.jsonl.")
    _add_sources(corpus, "; default: the sources of Python's standard library")
    corpus.add_argument("--out", required=True, metavar="PREFIX", help="write PREFIX.*.jsonl")
    corpus.add_argument(
        "--held-out", type=float, metavar="FRACTION", help=f"{_SHARE}; default 0.02"
    )

    tokenizer = verb("tokenizer", "Train a tokenizer into a folder.")
    _add_sources(tokenizer)
    tokenizer.add_argument("--out", required=True, type=Path, metavar="DIR", help="write here")
    size = "number of ids, 256 bytes and 3 or 4 special tokens among them; default 4096"
    tokenizer.add_argument("--vocab", type=int, default=4096, metavar="N", help=size)
    limit = "train on at most N chunks of about 1000 characters, chosen by hash; default 100000"
    tokenizer.add_argument("--sentences", type=int, default=100_000, metavar="N", help=limit)
    kind = (
        "kind of tokenizer: sentencepiece's bpe, as Llama 2's (default), or unigram, as T5's; or "
        "bytes, a byte-level BPE, as Llama 3's, Qwen's and GPT-2's"
    )
    kinds = ("bpe", "unigram", "bytes")
    tokenizer.add_argument("--model-type", choices=kinds, default="bpe", help=kind)

    _add_pack(
        verb("pack", "Tokenize documents into PREFIX.bin, PREFIX.idx and PREFIX.manifest.json.")
    )
    _add_verify(verb("verify", "Check a packed corpus against its manifest, byte by byte."))
    return parser


def _add_sources(to: argparse.ArgumentParser, note: str = "") -> None:
    to.add_argument("--input", nargs="+", metavar="PATH", help=_KINDS + note)
    file = "data file that names the sources instead (configs/data); a flag overrides its field"
    to.add_argument("--config", type=Path, metavar="FILE", help=file)
    field = "field or column of --input that holds the text; default text"
    to.add_argument("--text", metavar="FIELD", help=field)
    separator = r"what stands between the documents of a .txt file, such as '<|endoftext|>'"
    to.add_argument("--separator", metavar="TEXT", help=separator)
    plain = "further endings of files that are read as .txt, such as .md .rst .c"
    to.add_argument("--plain", nargs="+", metavar="ENDING", help=plain)
    invalid = "documents that cannot be read end the command (default), or are left out"
    to.add_argument("--invalid", choices=("error", "skip"), help=invalid)
    limit = "longer documents are left out and counted; default 64 MiB"
    to.add_argument("--max-document-bytes", type=int, metavar="N", help=limit)


def _add_pack(pack: argparse.ArgumentParser) -> None:
    _add_sources(pack)
    model = "folder of a sentencepiece tokenizer.model or a Hugging Face tokenizer, or a file of it"
    pack.add_argument("--tokenizer", metavar="DIR", help=model)
    pack.add_argument("--out", required=True, metavar="PREFIX", help="write PREFIX.bin, ...")
    processes = "processes; the output does not depend on them; default: all cores"
    pack.add_argument("--workers", type=int, metavar="N", help=processes)
    help_ = f"{_SHARE}: PREFIX.train and PREFIX.valid; default: one corpus, PREFIX"
    pack.add_argument("--held-out", type=float, metavar="FRACTION", help=help_)
    for name, place in (("bos", "before"), ("eos", "after")):
        help_ = f"put the tokenizer's {name.upper()} {place} every document; default: if it has one"
        pack.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=help_)
    shard = "a shard ends with the document that reaches N tokens; default 2**31"
    pack.add_argument("--shard-tokens", type=int, metavar="N", help=shard)
    help_ = "who else is to read the .idx: DeepSpeed (default), or Megatron-LM and GPT-NeoX"
    pack.add_argument("--type-codes", choices=("deepspeed", "megatron"), help=help_)
    fresh = "begin anew instead of going on with what was interrupted"
    pack.add_argument("--fresh", action="store_true", help=fresh)


def _add_verify(verify: argparse.ArgumentParser) -> None:
    packed = "prefix of the corpus, as given to pack; with a held-out part PREFIX.train"
    verify.add_argument(
        "--out", "--input", dest="prefix", required=True, metavar="PREFIX", help=packed
    )
    made_by = "also check that this tokenizer made the corpus"
    verify.add_argument("--tokenizer", type=Path, metavar="DIR", help=made_by)
    readers = "processes that read shards; default: all cores"
    verify.add_argument("--workers", type=int, metavar="N", help=readers)
    unknown = "largest share of unknown tokens; default 0.01"
    verify.add_argument("--max-unknown", type=float, default=0.01, metavar="SHARE", help=unknown)
    density = "fewest bytes of text a token; default 1"
    verify.add_argument("--min-bytes-per-token", type=float, default=1.0, metavar="N", help=density)


def _preparation(options: argparse.Namespace) -> Any:
    """The data file with the flags over it; None without sources."""
    from data_prep.config import Preparation, read_data_file
    from est_ds.config.strict import checked

    names = set(Preparation.model_fields) - {"sources"}
    given = vars(options)
    settings = {n: given[n] for n in names if given.get(n) is not None}
    of_source = {n: given[n] for n in ("text", "separator", "plain") if given[n] is not None}
    if options.config and (options.input or of_source):
        flag = "--input" if options.input else f"--{next(iter(of_source))}"
        raise UserError(f"{flag} beside --config: the data file says that; leave one of them out.")
    if not options.config and not options.input:
        if options.verb == "corpus" and not of_source:
            return None
        raise UserError("--input is missing; name files, folders or globs, or a --config.")
    if options.config:
        tree = read_data_file(options.config).model_dump(exclude_unset=True)
    else:
        # A command line has no other way to spell a line break.
        if "separator" in of_source:
            typed = of_source["separator"]
            of_source["separator"] = typed.replace("\\r\\n", "\n").replace("\\n", "\n")
        tree = {"sources": [{"path": options.input, **of_source}]}
    try:
        return checked(Preparation, tree | settings)
    except UserError as error:
        # Of a flag, since a data file was checked before.
        said = re.sub(r"^sources[.\[]0\]?[.:]? *", "", str(error))
        field, rest = re.match(r"(\w*)(.*)", said, re.DOTALL).groups()
        raise UserError(f"--{field.replace('_', '-')}{rest}") from None


def _run(options: argparse.Namespace) -> None:
    # Each verb imports its own tools: sentencepiece and transformers load slowly.
    if options.verb == "verify":
        from data_prep.verify import Limits, verify

        limits = Limits(options.max_unknown, options.min_bytes_per_token)
        verify(options.prefix, options.tokenizer, options.workers, limits)
        return
    from data_prep.readers.base import Rules

    preparation = _preparation(options)
    sources = preparation.sources if preparation else None
    rules = Rules(preparation.max_document_bytes, preparation.invalid) if preparation else Rules()
    if options.verb == "corpus":
        from data_prep.corpus import gather

        share = preparation.held_out if preparation else options.held_out
        gather(sources, options.out, 0.02 if share is None else share, rules)
    elif options.verb == "tokenizer":
        from data_prep.tokenizer import Wish, train

        wish = Wish(options.vocab, options.sentences, options.model_type)
        train(sources, options.out, wish, rules)
    else:
        from data_prep.pack import pack

        pack(preparation, options.out, options.workers, options.fresh)


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; returns 0 when done, 2 for wrong input, 1 for a failure of the system."""
    try:
        _run(_parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, Failure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
