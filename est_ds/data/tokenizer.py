"""Which files define a tokenizer, and the hashes that a corpus knows it by."""

import hashlib
import json
from pathlib import Path
from typing import Any

from est_ds.config.kinds import is_url
from est_ds.data.staging import staged_folder
from est_ds.errors import UserError

SENTENCEPIECE = "tokenizer.model"
HUGGING_FACE = "tokenizer.json"
# What a folder without tokenizer.json may hold instead; Hugging Face converts it when it loads it.
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
# What `AutoTokenizer` reads besides, and an export copies.
CONFIG = "tokenizer_config.json"
_COMPANIONS = (CONFIG, "special_tokens_map.json", "added_tokens.json")
_CHAT_TEMPLATE = "chat_template.jinja"
# A model's config beside a tokenizer: `AutoTokenizer` takes from it which class the tokenizer has.
_MODEL_CONFIG = "config.json"
_OF_MODEL_CONFIG = ("model_type", "tokenizer_class")
# Of the companions: what changes no id of a text.
_INERT = frozenset(
    (
        "chat_template",
        "clean_up_tokenization_spaces",
        "is_local",
        "local_files_only",
        "model_max_length",
        "name_or_path",
        "padding_side",
        "processor_class",
        "truncation_side",
        "use_default_system_prompt",
    )
)


def _here(tokenizer: str | Path) -> Path:
    """Where a tokenizer lies on this machine; one in a bucket is copied."""
    if not is_url(str(tokenizer)):
        return Path(tokenizer)
    names = (SENTENCEPIECE, HUGGING_FACE, *VOCABULARIES, *_COMPANIONS, _CHAT_TEMPLATE)
    return staged_folder(str(tokenizer), (*names, _MODEL_CONFIG))


def defining_files(tokenizer: str | Path) -> list[Path]:
    """The files by which a corpus has always known its tokenizer (`tokenizer_sha256`).

    Args:
        tokenizer: A folder, or the `tokenizer.model` or `tokenizer.json` in it. In a folder
            `tokenizer.model` comes before `tokenizer.json`, and that before older formats: the
            hash in manifests is that of the first.

    Raises:
        UserError: There is none.
    """
    path = _here(tokenizer)
    if path.is_file() and path.name in (SENTENCEPIECE, HUGGING_FACE):
        return [path]
    for names in ((SENTENCEPIECE,), (HUGGING_FACE,), VOCABULARIES):
        if found := [path / name for name in names if (path / name).is_file()]:
            return found
    raise UserError(
        f"tokenizer {tokenizer}: {path / SENTENCEPIECE} does not exist, nor does {HUGGING_FACE}; "
        f"give a folder that holds a sentencepiece tokenizer.model or a Hugging Face tokenizer, or "
        f"train one with `python -m data_prep tokenizer`."
    )


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / n).is_file() for n in (SENTENCEPIECE, HUGGING_FACE, *VOCABULARIES))


def tokenizer_files(tokenizer: str | Path) -> list[Path]:
    """Every file of a tokenizer's folder that Hugging Face reads; of a sentencepiece model alone,
    that one.

    Raises:
        UserError: None defines a tokenizer.
    """
    path = _here(tokenizer)
    folder = path.parent if path.is_file() else path
    defining_files(path)
    if sentencepiece_alone(path):
        return [path if path.is_file() else folder / SENTENCEPIECE]
    names = (SENTENCEPIECE, HUGGING_FACE, *VOCABULARIES, *_COMPANIONS, _CHAT_TEMPLATE)
    return [folder / name for name in names if (folder / name).is_file()]


def sentencepiece_alone(tokenizer: str | Path) -> bool:
    """Whether nothing says how Hugging Face is to read a sentencepiece model: as Llama 2 comes from
    its makers, or where `tokenizer.model` itself is given."""
    path = _here(tokenizer)
    if path.is_file():
        return path.name == SENTENCEPIECE
    beside = (HUGGING_FACE, *_COMPANIONS, _MODEL_CONFIG)
    return (path / SENTENCEPIECE).is_file() and not any((path / n).is_file() for n in beside)


def tokenizer_sha256(tokenizer: str | Path) -> str:
    """SHA-256 of the tokenizer's defining file, or of the hashes of several, 64 hex characters.

    Raises:
        UserError: There is none.
    """
    hashes = [file_sha256(path) for path in defining_files(tokenizer)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: str | Path) -> str:
    """SHA-256 of everything in a tokenizer's folder that changes the ids of a text, or which ids
    stand around it, 64 hex characters: what `tokenizer_sha256` covers, and the settings beside it.

    Raises:
        UserError: There is no tokenizer.
    """
    files = tokenizer_files(tokenizer)
    if not sentencepiece_alone(tokenizer):
        files.append(files[0].parent / _MODEL_CONFIG)
    state = hashlib.sha256()
    for path in files:
        if path.name == _CHAT_TEMPLATE or not path.is_file():
            continue
        settings = _settings(path) if path.name in (*_COMPANIONS, _MODEL_CONFIG) else None
        if settings is None:
            content = file_sha256(path)
        else:
            content = json.dumps(settings, sort_keys=True)
        state.update(f"{path.name} {content}\n".encode())
    return state.hexdigest()


def _settings(path: Path) -> dict[str, Any] | None:
    """What counts of a file of settings; None if it is no JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    if path.name == _MODEL_CONFIG:
        return {name: content[name] for name in _OF_MODEL_CONFIG if name in content}
    return {name: value for name, value in content.items() if name not in _INERT}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex characters."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()
