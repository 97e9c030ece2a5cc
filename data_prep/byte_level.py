"""A byte-level BPE, as GPT-2, Llama 3 and Qwen have one, trained by Hugging Face's `tokenizers`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from est_ds.data.auto_tokenizer import plain_ids
from est_ds.data.tokenizer import CONFIG, HUGGING_FACE
from est_ds.errors import UserError

# Their ids are 0 to 3.
SPECIAL = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "pad_token": "<|pad|>",
    "mask_token": "<|mask|>",
}
# Where Qwen2 cuts a text before it looks for pairs (its tokenizer.json); Llama 3 has the same, but
# takes up to three digits at once, for which a small vocabulary has no room.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A pair that is there once says nothing about other texts.
_FEWEST = 2
_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **SPECIAL,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def train_byte_level(texts: list[str], vocabulary: int, samples: list[str]) -> dict[str, bytes]:
    """Files of a tokenizer's folder by name: `tokenizer.json` and `tokenizer_config.json`.

    Every text is bytes, so no token is unknown, nothing is normalised, and decoding returns the
    text. What AutoTokenizer makes of the files is checked on samples.

    Args:
        vocabulary: number of ids, with 4 special tokens and 256 bytes.

    Raises:
        UserError: the texts have fewer pairs that repeat.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=_FEWEST,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (most := tokenizer.get_vocab_size()) < vocabulary:
        raise UserError(
            f"--vocab={vocabulary} does not fit the text of --input: no pair that is there "
            f"{_FEWEST} times is left after {most} ids; use --vocab {most} at most or more text."
        )
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 0)]
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder, HUGGING_FACE)))
        Path(folder, CONFIG).write_text(json.dumps(_CONFIG, indent=2) + "\n")
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        contents = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    for text in samples:
        assert loaded.decode(plain_ids(loaded, text)) == text, f"{text!r} is not what it was"
    return contents
