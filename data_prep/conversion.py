"""A sentencepiece model as the files that `transformers.AutoTokenizer` loads."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import sentencepiece

from est_ds.data.auto_tokenizer import plain_ids, special_tokens
from est_ds.data.tokenizer import CONFIG, HUGGING_FACE, SENTENCEPIECE

_BPE = {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": False, "legacy": False}
_UNIGRAM = {"model_input_names": ["input_ids", "attention_mask"]}
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
    bpe = model_type == "bpe"
    config = {"tokenizer_class": "LlamaTokenizer" if bpe else "PreTrainedTokenizerFast"}
    config |= special_tokens(processor) | {"clean_up_tokenization_spaces": False}
    config |= _BPE if bpe else _UNIGRAM
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder, HUGGING_FACE)
        Path(folder, SENTENCEPIECE if bpe else "spiece.model").write_bytes(model)
        Path(folder, CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if bpe:
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            loaded.backend_tokenizer.save(str(converted))
        else:
            _unigram(processor).save(str(converted))
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        contents = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    for text in samples:
        ids, expected = plain_ids(loaded, text), processor.encode(text)
        same = ids == expected
        if not bpe and not same:
            scores = [sum(map(processor.get_score, i)) for i in (ids, expected)]
            decoded = processor.decode(ids) == processor.decode(expected)
            same = math.isclose(*scores, rel_tol=1e-6) and decoded
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
    special = special_tokens(processor).values()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", processor.bos_id())]
    )
    return tokenizer
