"""The proof that an exported tokenizer gives the ids of the corpus: for every form of tokenizer it
passes for the one that packed, and for no other."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.__main__ import main
from est_ds.data.encoders import load_encoder
from est_ds.data.indexed import Corpus
from est_ds.data.objectives.ul2 import PRESETS, Ul2
from est_ds.errors import UserError
from est_ds.export.tokenizer import check_tokenizer, write_tokenizer
from packings import source, texts  # noqa: F401


def wordpiece(texts, folder):
    """BERT's uncased: loses cases, spaces and unknown characters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        [text.replace("{", "") for text in texts],  # unknown then
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)


def byte_level(texts, folder, prefix=False):
    """GPT-2's: one token that is BOS, EOS and unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    end, alphabet = "<|endoftext|>", pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=[end], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end
    ).save_pretrained(folder)


def metaspace(texts, folder):
    """Llama's, as converted from sentencepiece: a space before every text, bytes of the rest."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts[:50], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def own(texts, folder, kind):
    """data_prep's."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    file = folder.with_name("texts.jsonl")
    file.write_text(lines)
    arguments = ("--input", file, "--out", folder, "--vocab", 512, "--model-type", kind)
    assert main(["tokenizer", *map(str, arguments)]) == 0


def t5s(texts, folder):
    """T5's: a unigram sentencepiece that collapses spaces, and spiece.model beside it."""
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "spiece"),
        vocab_size=300,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


FORMS = {
    "wordpiece": wordpiece,
    "byte level": byte_level,
    "byte level with a space": functools.partial(byte_level, prefix=True),
    "metaspace": metaspace,
    "data_prep's bpe": functools.partial(own, kind="bpe"),
    "data_prep's unigram": functools.partial(own, kind="unigram"),
    "data_prep's bytes": functools.partial(own, kind="bytes"),
    "t5's sentencepiece": t5s,
}
FAST = ("wordpiece", "byte level")


@pytest.fixture(scope="session")
def made(texts, source, tmp_path_factory):  # noqa: F811
    """A tokenizer of a form and the corpus that it packed; each made once."""

    @functools.cache
    def make(form) -> tuple[Path, Corpus]:
        folder = tmp_path_factory.mktemp("form") / "tokenizer"
        FORMS[form](texts, folder)
        prefix = folder.with_name("corpus")
        packing = ("--input", source, "--tokenizer", folder, "--out", prefix, "--workers", 1)
        assert main(["pack", *map(str, packing)]) == 0
        return folder, Corpus.open(prefix)

    return make


def passes(form, made):
    folder, corpus = made(form)
    [line, *_] = check_tokenizer(
        AutoTokenizer.from_pretrained(folder), load_encoder(folder), [corpus]
    )
    same, of = (
        int(word) for word in line.split(" ids of ")[1].split(" documents")[0].split(" of ")
    )
    assert same == of > 20


@pytest.mark.parametrize("form", FAST)
def test_the_tokenizer_that_packed_passes(form, made):
    passes(form, made)


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if form not in FAST])
def test_every_form_of_tokenizer_that_packed_passes(form, made):
    passes(form, made)


def test_a_tokenizer_that_encodes_otherwise_than_packing_is_refused(made):
    folder, corpus = made("byte level")
    other = AutoTokenizer.from_pretrained(folder)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match=r"does not encode as .* was packed: .* token 0 as \["):
        check_tokenizer(other, load_encoder(folder), [corpus])


def test_a_tokenizer_that_did_not_pack_is_refused(made):
    """Also where packing and the export would agree on it, as after a change of both."""
    folder, _ = made("byte level")
    _, corpus = made("wordpiece")
    with pytest.raises(UserError, match=r"holds in \d of \d\d documents"):
        check_tokenizer(AutoTokenizer.from_pretrained(folder), load_encoder(folder), [corpus])


def test_a_tokenizer_without_bos_is_said_where_documents_have_it(made, tmp_path):
    folder, corpus = made("wordpiece")
    lines = check_tokenizer(AutoTokenizer.from_pretrained(folder), load_encoder(folder), [corpus])
    assert "puts no BOS before a text" in lines[-1] and "(id 2)" in lines[-1]


def test_ids_beyond_the_tokenizer_get_names_and_texts_keep_their_ids(made, tmp_path):
    folder, corpus = made("byte level")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    objective = Ul2(PRESETS["causal_prefix_span"], sequence=64, first_id=610)
    named, lines = write_tokenizer(tmp_path, str(folder), objective)
    assert not lines
    ids = {"<mode_R>": 610, "<mode_S>": 611, "<mode_X>": 612, "<extra_id_0>": 613}
    assert {name: named.convert_tokens_to_ids(name) for name in ids} == ids
    assert named("<extra_id_0>", add_special_tokens=False)["input_ids"] == [613]
    assert "<unused_609>" in named.get_vocab() and len(named) == 610 + objective.num_own_ids
    check_tokenizer(named, load_encoder(folder), [corpus])
