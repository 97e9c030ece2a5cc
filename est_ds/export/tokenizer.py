"""The tokenizer of an exported folder, and the proof that it gives the ids of the corpus."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from est_ds.data.auto_tokenizer import copy_tokenizer, plain_ids
from est_ds.data.encoders import Encoder
from est_ds.data.indexed import Corpus
from est_ds.data.objectives.base import Objective
from est_ds.errors import UserError

_CONFIG = "tokenizer_config.json"
_NUM_DOCUMENTS = 32  # of each held-out corpus
_MAX_TOKENS = 4096  # of each of these
_MOST = 0.5  # of them must come out as packed; spaces or cases may be lost in the others
_TORN = 64  # tokens before a cut that may come out otherwise without the text behind it


def write_tokenizer(folder: Path, source: str, objective: Objective) -> tuple[Any, list[str]]:
    """Copies a tokenizer, and gives names to the ids that the objective trained besides.

    Args:
        folder: of a model; transformers goes by its config.json too.
        source: the tokenizer's folder, or a file in it.

    Returns:
        The tokenizer as transformers loads it from `folder`, and lines for the user.
    """
    from transformers import AutoTokenizer

    tokenizer = copy_tokenizer(source, folder)
    if not objective.own_tokens:
        return tokenizer, []
    names = _add_tokens(tokenizer, objective)
    with TemporaryDirectory() as beside:
        shutil.copyfile(folder / "config.json", Path(beside, "config.json"))
        tokenizer.save_pretrained(beside)
        _keep_settings(folder / _CONFIG, Path(beside, _CONFIG), tokenizer.mask_token)
        named = AutoTokenizer.from_pretrained(beside)
        for id_, name in names.items():
            if named.convert_tokens_to_ids(name) != id_:
                line = f"tokenizer: it cannot name the ids of the objective (as {name} for {id_})"
                return AutoTokenizer.from_pretrained(folder), [line]
        for file in Path(beside).iterdir():
            shutil.copyfile(file, folder / file.name)
    return AutoTokenizer.from_pretrained(folder), []


def _add_tokens(tokenizer: Any, objective: Objective) -> dict[int, str]:
    """Names an objective's ids; those of the tokenizer keep their names. Returns all by id."""
    from transformers import AddedToken

    names, known = {}, tokenizer.get_vocab()
    by_id = {id_: name for name, id_ in known.items()}
    first = 1 + max(known.values())
    own = objective.own_tokens
    for id_ in [*(i for i in own if i < first), *range(first, 1 + max(own))]:
        name = own.get(id_, f"<unused_{id_}>")
        names[id_] = by_id.get(id_) or (f"<{id_}_{name}>" if name in known else name)
    new = [
        AddedToken(name, normalized=False, special=True)
        for id_, name in sorted(names.items())
        if id_ >= first
    ]
    tokenizer.add_tokens(new, special_tokens=True)
    if objective.mask_id is not None:
        tokenizer.mask_token = names[objective.mask_id]
    return names


def _keep_settings(former: Path, saved: Path, mask_token: str | None) -> None:
    """Puts the settings back that saving leaves out, and that other readers go by."""
    settings = json.loads((former if former.is_file() else saved).read_text())
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name before transformers 5
    if mask_token is not None:
        settings["mask_token"] = mask_token
    saved.write_text(json.dumps(settings, indent=2) + "\n")


def check_tokenizer(tokenizer: Any, encoder: Encoder, corpora: list[Corpus]) -> list[str]:
    """Proves on documents of corpora that an exported tokenizer gives the ids that were packed.

    A document's ids become text again by the packer's tokenizer. No tokenizer promises to undo
    what it did, so that this text may not be the document's; but the packer's tokenizer and the
    exported one must agree on it whatever it is; and where they give the packed ids again, which
    most documents must, it is as good as the document's.

    Args:
        tokenizer: as transformers loads it.
        encoder: the tokenizer as packing uses it.

    Returns:
        Lines for the user.

    Raises:
        UserError: it is not the tokenizer of a corpus.
    """
    lines = []
    for corpus in corpora:
        same = tokens = documents = 0
        for ids, is_whole in _documents(corpus, encoder):
            text = encoder.decode(ids)
            given, [expected] = plain_ids(tokenizer, text), encoder.encode([text])
            packed = ids
            if not is_whole:
                until = len(ids) - _TORN
                packed, expected, given = packed[:until], expected[:until], given[:until]
            if given != expected:
                _refuse(corpus, text, expected, given)
            documents += 1
            if given == packed:
                same, tokens = same + 1, tokens + len(given)
        if not same or same < documents * _MOST:
            raise UserError(
                f"data.tokenizer gives the ids that the corpus {corpus.prefix} holds in {same} of "
                f"{documents} documents: it was packed by another tokenizer, or another version. "
                f"Name that with data.tokenizer=DIR, or pack the corpus again with `python -m "
                f"data_prep pack` and train on it; nothing was exported."
            )
        lines.append(
            f"tokenizer: AutoTokenizer gives the packed ids of {same} of {documents} documents "
            f"({tokens:,} tokens) of {corpus.prefix}"
        )
    return lines + _framing(tokenizer, corpora[0])


def _documents(corpus: Corpus, encoder: Encoder) -> Iterator[tuple[list[int], bool]]:
    """Ids of documents spread evenly over a corpus, without what stands around them, and whether
    they are whole: special ids end them, since text that spells these is read as text."""
    numbers = _spread(corpus)
    starts, ends = corpus.document_start(numbers), corpus.document_start(numbers + 1)
    special = {encoder.bos_id, encoder.eos_id, encoder.unknown_id}
    if corpus.manifest:
        special |= {corpus.manifest.bos_id, corpus.manifest.eos_id}
    for start, end in zip(starts.tolist(), ends.tolist()):
        ids = corpus.window(start, min(end - start, _MAX_TOKENS + 2)).tolist()
        is_whole = end - start <= len(ids)
        while ids and ids[0] in special:
            ids = ids[1:]
        while is_whole and ids and ids[-1] in special:
            ids = ids[:-1]
        inside = [i for i, id_ in enumerate(ids) if id_ in special]
        if inside:
            ids, is_whole = ids[: inside[0]], False
        if len(ids) > (0 if is_whole else _TORN):
            yield ids, is_whole


def _refuse(corpus: Corpus, text: str, expected: list[int], given: list[int]) -> None:
    pairs = zip([*expected, None], [*given, None])
    at = next(i for i, (a, b) in enumerate(pairs) if a != b)
    raise UserError(
        f"the tokenizer does not encode as the corpus {corpus.prefix} was packed: of "
        f"{text[:40]!r}... packing gives token {at} as {expected[at : at + 3]}, and "
        f"AutoTokenizer.from_pretrained(export) as {given[at : at + 3]}; nothing was exported. "
        f"Give data.tokenizer=DIR a folder that transformers reads as the corpus was packed, or "
        f"pack the corpus again and train on it."
    )


def _framing(tokenizer: Any, corpus: Corpus) -> list[str]:
    """Says it where texts of the tokenizer begin in another way than documents."""
    bos, first = _begins_with(tokenizer, corpus), next(iter(tokenizer("a")["input_ids"]), -1)
    if bos is not None and bos != first:
        return [
            f"tokenizer: AutoTokenizer puts no BOS before a text, and documents of the corpus "
            f"begin with it (id {bos}): put it before a prompt"
        ]
    if bos is None and first in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        name = tokenizer.convert_ids_to_tokens(first)
        return [
            f"tokenizer: AutoTokenizer puts {name} (id {first}) before a text, and documents of "
            f"the corpus do not begin with it: encode prompts with add_special_tokens=False"
        ]
    return []


def _begins_with(tokenizer: Any, corpus: Corpus) -> int | None:
    """The id that stands before every document; of a corpus made elsewhere: before those that are
    looked at."""
    if corpus.manifest:
        return corpus.manifest.bos_id
    starts = corpus.document_start(_spread(corpus)).tolist()
    firsts = {int(corpus.window(s, 1)[0]) for s in starts if s < corpus.num_tokens}
    known = {tokenizer.bos_token_id, tokenizer.cls_token_id}
    return firsts.pop() if len(firsts) == 1 and firsts <= known else None


def _spread(corpus: Corpus) -> np.ndarray:
    """Numbers of documents spread evenly over a corpus, int64."""
    return np.unique(np.linspace(0, corpus.num_documents - 1, _NUM_DOCUMENTS).astype(np.int64))
