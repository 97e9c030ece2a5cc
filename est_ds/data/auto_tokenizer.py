"""A tokenizer as `transformers.AutoTokenizer` reads it, the same in packing and in an export."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from est_ds.data.tokenizer import (
    CONFIG,
    HUGGING_FACE,
    SENTENCEPIECE,
    defining_files,
    sentencepiece_alone,
    tokenizer_files,
    tokenizer_sha256,
)
from est_ds.errors import UserError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "cls_token", "sep_token", "mask_token")
# Which class transformers takes must not depend on the model that lies beside the tokenizer: this
# one reads tokenizer.json as it stands, in transformers 4 too.
_PLAIN_CLASS = "PreTrainedTokenizerFast"
# What a conversion may read otherwise: spaces, characters that normalisation changes, bytes.
_PROBES = (
    "a",
    " a",
    "  a  b ",
    "a\n\n b\t",
    "ﬁ ½ é e\u0301 Å \u00a0x\u3000y",
    "好 😀 \x00\x7f\u200b",
    "\u2581a \u2581\u2581",
    "1234567 3.14",
    "<s> </s> <unk> <pad> <0x0A>",
    "\r\n",
    "x" * 40,
)


def load_processor(path: Path) -> Any:
    """A sentencepiece model.

    Raises:
        UserError: it is none.
    """
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise UserError(
            f"--tokenizer: {path} is not a sentencepiece model; copy it again, train one with "
            f"`python -m data_prep tokenizer`, or give the tokenizer.json beside it, if there is "
            f"one."
        ) from None


def load_tokenizer(tokenizer: str | Path) -> Any:
    """A tokenizer with the ids that transformers gives for its folder.

    A sentencepiece model alone encodes as sentencepiece does: what transformers makes of it has no
    space before a text, whatever the model says, and is completed.

    Returns:
        A `transformers.PreTrainedTokenizerFast`; its `backend_tokenizer` makes the ids.

    Raises:
        UserError: there is none, or transformers cannot load it, or its ids are drawn at random, or
            a sentencepiece model alone cannot be had in transformers.
    """
    file = defining_files(tokenizer)[0]
    if not sentencepiece_alone(tokenizer):
        return _loaded(file.parent)
    processor = load_processor(file)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(file, Path(folder, SENTENCEPIECE))
        _write_alone(processor, Path(folder))
        loaded = _loaded(Path(folder))
    for text in _PROBES:
        check_same_ids(text, plain_ids(loaded, text), processor.encode(text))
    return loaded


def plain_ids(loaded: Any, text: str) -> list[int]:
    """Ids of a text with nothing around them; text that spells a special token stays text."""
    return loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def check_same_ids(text: str, transformers: list[int], sentencepiece: list[int]) -> None:
    """Compares what transformers and sentencepiece make of a text with a sentencepiece model.

    Raises:
        UserError: it is not the same.
    """
    if transformers != sentencepiece:
        at = next(
            (i for i, pair in enumerate(zip(transformers, sentencepiece)) if pair[0] != pair[1]),
            min(len(transformers), len(sentencepiece)),
        )
        raise UserError(
            f"--tokenizer: sentencepiece and transformers read its tokenizer.model alone "
            f"differently: the text {text[:60]!r} becomes {sentencepiece[at : at + 4]} and "
            f"{transformers[at : at + 4]} (from token {at} on), so that no export could have the "
            f"ids of the corpus; give a folder that holds its tokenizer.json, such as "
            f"AutoTokenizer.from_pretrained(DIR).save_pretrained(NEW) writes."
        )


def check_same_tokenizer(tokenizer: str | Path, other: Path) -> None:
    """Checks that a tokenizer's ids mean the same in the tokenizer beside published weights, which
    may have more of them.

    Raises:
        UserError: they do not.
    """
    if tokenizer_sha256(tokenizer) == tokenizer_sha256(other):
        return
    ours, theirs = load_tokenizer(tokenizer), load_tokenizer(other)
    known = theirs.get_vocab()
    for token, id_ in sorted(ours.get_vocab().items(), key=lambda pair: pair[1]):
        if known.get(token) != id_:
            raise UserError(
                f"data.tokenizer={str(tokenizer)!r} has the id {id_} for {token!r}, and the "
                f"tokenizer of the weights (model.from={str(other)!r}) has {known.get(token)}: the "
                f"weights are of other ids; pack the corpora with that tokenizer, and give it."
            )
    for text in _PROBES:
        if (ids := plain_ids(ours, text)) != (others := plain_ids(theirs, text)):
            raise UserError(
                f"data.tokenizer={str(tokenizer)!r} gives {ids[:6]} for {text!r}, and that of the "
                f"weights (model.from={str(other)!r}) {others[:6]}; pack the corpora with that "
                f"tokenizer, and give it."
            )


def special_tokens(processor: Any) -> dict[str, str | None]:
    """The pieces of a sentencepiece model that `tokenizer_config.json` has to name."""
    ids = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    return {f"{n}_token": processor.id_to_piece(i) if i >= 0 else None for n, i in ids.items()}


def _write_alone(processor: Any, folder: Path) -> None:
    """Writes the Hugging Face files of the sentencepiece model in a folder: what transformers makes
    of it, with the spaces that this forgets."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, normalizers, processors

    tokens = special_tokens(processor)
    config = {"tokenizer_class": _PLAIN_CLASS, **tokens, "clean_up_tokenization_spaces": False}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    backend = _loaded(folder).backend_tokenizer
    model = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
    rules = model.normalizer_spec
    steps = []
    decoding = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("\u2581"))
        decoding.append(decoders.Strip(" ", left=1))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(decoding)
    if bos := tokens["bos_token"]:  # as Llama's
        put = [(bos, processor.bos_id())]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=put
        )
    backend.save(str(folder / HUGGING_FACE))


def copy_tokenizer(tokenizer: str | Path, folder: Path) -> Any:
    """Copies a tokenizer into a model's folder, such that `AutoTokenizer` gives the ids of packing.

    Where transformers, because of the `config.json` here, would take another class than in the
    tokenizer's own folder, it is written for a class that reads it as it stands.

    Args:
        folder: the model's, with its `config.json`.

    Returns:
        The tokenizer loaded from there: `backend_tokenizer` is that of `load_tokenizer` in every
        part, so that every text has the same ids.

    Raises:
        UserError: as `load_tokenizer`, or transformers reads no such tokenizer beside this model.
    """
    wanted = load_tokenizer(tokenizer)
    for source in tokenizer_files(tokenizer):
        shutil.copyfile(source, folder / source.name)
    if sentencepiece_alone(tokenizer):
        _write_alone(load_processor(folder / SENTENCEPIECE), folder)
    # Of some model types transformers takes its own class, whatever the file says, but where it
    # names code: that is not run, and the class that the file names is taken.
    for more in ({}, {"auto_map": {"AutoTokenizer": [None, None]}}):
        if loaded := _loaded_as(wanted, folder):
            return loaded
        wanted.save_pretrained(folder)
        config = json.loads((folder / CONFIG).read_text())
        config |= {"tokenizer_class": _PLAIN_CLASS, **more}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if loaded := _loaded_as(wanted, folder):
        return loaded
    model = json.loads((folder / "config.json").read_text()).get("model_type")
    raise UserError(
        f"tokenizer {tokenizer}: beside a model of type {model} transformers loads it in another "
        f"way than for packing, so it would give other ids; use a tokenizer made for that type, or "
        f"another model_type."
    )


def _loaded_as(wanted: Any, folder: Path) -> Any | None:
    """The tokenizer of a folder, if it gives every text the ids that another one gives."""
    try:
        loaded = _loaded(folder)
    except UserError:
        return None
    return loaded if _identity(loaded) == _identity(wanted) else None


def _loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        model = json.loads(loaded.backend_tokenizer.to_str())["model"]
    except Exception as error:  # whatever the library raises for files it cannot read
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--tokenizer: Hugging Face cannot load {folder} as a fast tokenizer "
            f"({type(error).__name__}: {reason}); copy it again, or save it with "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        ) from None
    if model.get("dropout"):
        raise UserError(
            f"--tokenizer: {folder} has BPE dropout (model.dropout={model['dropout']} in "
            f"tokenizer.json), so that the same text becomes other ids each time; set it to null."
        )
    return loaded


def _identity(loaded: Any) -> tuple:
    """Equal of two tokenizers that give every text the same ids."""
    backend = json.loads(loaded.backend_tokenizer.to_str())
    # Set anew by transformers with every call.
    backend |= {"truncation": None, "padding": None}
    return backend, [getattr(loaded, name) for name in _SPECIAL]
