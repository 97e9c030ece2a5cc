"""Which files define a tokenizer, and the hash that a corpus knows it by."""

import hashlib
from pathlib import Path

from est_ds.errors import UserError

SENTENCEPIECE = "tokenizer.model"
HUGGING_FACE = "tokenizer.json"
# What a folder without tokenizer.json may hold instead; Hugging Face converts it when it loads it.
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
# What `AutoTokenizer` reads besides, and an export copies.
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def defining_files(tokenizer: str | Path) -> list[Path]:
    """The files that say which ids a text becomes.

    Args:
        tokenizer: A folder, or the `tokenizer.model` or `tokenizer.json` in it. In a folder
            `tokenizer.model` comes before `tokenizer.json`, and that before older formats.

    Raises:
        UserError: There is none.
    """
    path = Path(tokenizer)
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


def tokenizer_files(tokenizer: str | Path) -> list[Path]:
    """Every file of a tokenizer's folder that Hugging Face needs to load it.

    Raises:
        UserError: None defines a tokenizer.
    """
    path = Path(tokenizer)
    folder = path.parent if path.is_file() else path
    defining_files(path)
    names = (SENTENCEPIECE, HUGGING_FACE, *VOCABULARIES, *_COMPANIONS)
    return [folder / name for name in names if (folder / name).is_file()]


def tokenizer_sha256(tokenizer: str | Path) -> str:
    """SHA-256 of the tokenizer's defining file, or of the hashes of several, 64 hex characters.

    Raises:
        UserError: There is none.
    """
    hashes = [file_sha256(path) for path in defining_files(tokenizer)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex characters."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()
