"""A sentencepiece model as the files that `transformers.AutoTokenizer` loads."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import sentencepiece

_SETTINGS = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "clean_up_tokenization_spaces": False,
}
_LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    **_SETTINGS,
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": False,
    "legacy": False,
}
_UNIGRAM = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **_SETTINGS,
    "model_input_names": ["input_ids", "attention_mask"],
}
# Pieces that sentencepiece never finds in a text, but Hugging Face's trie holds: below any path.
_NEVER = -1e4


def hugging_face_files(model: bytes, model_type: str, samples: list[str]) -> dict[str, bytes]:
    """Files of a tokenizer's folder by name, checked on samples.

    A BPE goes by its `tokenizer.model`, and Hugging Face encodes as sentencepiece does. Where
    several ways to cut a text are equally likely, the two may choose another one of a unigram
    model's: that one goes by its `tokenizer.json`, with the model beside it as `spiece.model`.
    """
    from transformers import AutoTokenizer

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    model_name = "tokenizer.model" if model_type == "bpe" else "spiece.model"
    config = json.dumps(_LLAMA if model_type == "bpe" else _UNIGRAM, indent=2) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder, "tokenizer.json")
        Path(folder, model_name).write_bytes(model)
        Path(folder, "tokenizer_config.json").write_text(config)
        if model_type == "bpe":
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            loaded.backend_tokenizer.save(str(converted))
        else:
            _unigram(processor).save(str(converted))
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        contents = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    for text in samples:
        # Text such as "</s>" is text here, and a special token to Hugging Face unless told.
        ids = loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        same = ids == processor.encode(text)
        if model_type == "unigram" and not same:
            scores = [sum(map(processor.get_score, i)) for i in (ids, processor.encode(text))]
            same = math.isclose(*scores, rel_tol=1e-6) and processor.decode(ids) == text
        assert same, f"Hugging Face encodes {text!r} differently"
    return contents


def _unigram(processor: sentencepiece.SentencePieceProcessor):
    """The model as one of `tokenizers`; transformers converts only BPE by itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    vocabulary = []
    for id_ in range(processor.vocab_size()):
        apart = processor.is_control(id_) or processor.is_byte(id_) or processor.is_unknown(id_)
        score = _NEVER if apart else processor.get_score(id_)
        vocabulary.append((processor.id_to_piece(id_), score))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=processor.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [_SETTINGS[name] for name in ("unk_token", "bos_token", "eos_token")]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", processor.bos_id())]
    )
    return tokenizer
