"""Every form of tokenizer: what is packed, what transformers encodes, what an export encodes."""

from __future__ import annotations

import hashlib
import io
import json
import random

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from conftest import ROOT
from data_prep.__main__ import main
from est_ds.data.auto_tokenizer import copy_tokenizer, load_processor
from est_ds.data.indexed import Corpus
from est_ds.errors import UserError
from packings import pack, pack_arguments

CODE = (ROOT / "est_ds" / "config" / "sections.py").read_text()
TEXTS = [
    "hello  world", " leading", "x = 1\n\n\treturn 12345  ", "<|im_start|>user\n    hello",
    "</s><s>", "ﬁ ½ É e\u0301 好 😀 \u2581a", "a</s>b [MASK] <unk>", CODE[:3000],
]  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "t5", "mamba", "mamba2")
LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


def sentencepiece_model(folder, **settings):
    """`tokenizer.model` as Llama 2's is made: a space before every text, bytes for the unknown."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE.splitlines(keepends=True)),
        model_writer=model,
        **{
            "vocab_size": 420,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "minloglevel": 2,
            **settings,
        },
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def write_config(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def byte_level(folder, normalizer=None, prefix=False, **special):
    """A byte-level BPE in tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [CODE],
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def alone(folder):
    sentencepiece_model(folder)


def alone_with_normalisation(folder):
    sentencepiece_model(folder, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)


def with_a_config(folder):
    sentencepiece_model(folder)
    write_config(folder, **LLAMA, add_prefix_space=True)


def with_added_tokens(folder):
    with_a_config(folder)
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    loaded.add_tokens(["<|im_start|>", "    "])
    loaded.add_special_tokens({"pad_token": "<pad>"})
    loaded.save_pretrained(folder)


def with_normalisers(folder):
    steps = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.StripAccents()]
    byte_level(folder, normalizers.Sequence(steps), prefix=True, eos_token="<eos>")


def gpt2_of_old_files(folder):
    byte_level(folder, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    tree = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"] | {"<|endoftext|>": len(tree["model"]["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, tree["model"]["merges"])) + "\n")
    (folder / "tokenizer.json").unlink()
    write_config(folder, tokenizer_class="GPT2Tokenizer")


def bert_of_a_vocabulary(folder):
    folder.mkdir(exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = sorted({c for c in CODE.lower() if not c.isspace()})
    pieces = special + characters + [f"##{c}" for c in characters] + ["hello", "world"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    write_config(folder, tokenizer_class="BertTokenizer", do_lower_case=True)


def data_preps_bytes(folder):
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text(CODE)
    train(folder, "--vocab", "420", "--model-type", "bytes", out=folder)
    (folder / "a.txt").unlink()


FORMS = [
    alone, alone_with_normalisation, with_a_config, with_added_tokens, with_normalisers,
    gpt2_of_old_files, bert_of_a_vocabulary, data_preps_bytes,
]  # fmt: skip


def plain(loaded, text):
    return loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def independently(form, folder):
    """What sentencepiece makes of the texts with its model alone, or transformers with the folder;
    and the ids before and after a document."""
    if form in (alone, alone_with_normalisation):
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return [model.encode(text) for text in TEXTS], [model.bos_id()], [model.eos_id()]
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    bos = loaded.cls_token_id if loaded.bos_token_id is None else loaded.bos_token_id
    eos = loaded.sep_token_id if loaded.eos_token_id is None else loaded.eos_token_id
    before = [] if bos in (None, eos) else [bos]
    return [plain(loaded, text) for text in TEXTS], before, [eos]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def exported(folder, family, out):
    """The tokenizer of an export of a model of that family, loaded as anybody would."""
    out.mkdir()
    AutoConfig.for_model(family).save_pretrained(out)
    copy_tokenizer(folder, out)
    return AutoTokenizer.from_pretrained(out)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_packed_ids_are_those_of_the_folder_and_of_the_export(form, source, tmp_path):
    form(tmp_path / "tok")
    expected, before, after = independently(form, tmp_path / "tok")
    pack(source, tmp_path / "tok", tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    documents = [[*before, *ids, *after] for ids in expected]
    assert corpus.window(0, corpus.num_tokens).tolist() == sum(documents, [])
    # Of Qwen2, transformers takes another class than the files name.
    loaded = exported(tmp_path / "tok", "qwen2", tmp_path / "export")
    assert [plain(loaded, text) for text in TEXTS] == expected
    assert (
        main(
            [
                "verify",
                "--out",
                str(tmp_path / "c"),
                "--tokenizer",
                str(tmp_path / "tok"),
                "--max-unknown",
                "1",
                "--min-bytes-per-token",
                "0",
            ]
        )
        == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_exports_of_every_family_have_the_ids_of_every_form(form, family, tmp_path):
    form(tmp_path / "tok")
    expected, before, _ = independently(form, tmp_path / "tok")
    loaded = exported(tmp_path / "tok", family, tmp_path / "export")
    assert [plain(loaded, text) for text in TEXTS] == expected
    if form is alone:
        assert loaded(TEXTS[0])["input_ids"] == before + expected[0]
        assert loaded.decode(expected[3]) == TEXTS[3]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"model_type": "unigram"}, "<s> </s>"),  # transformers finds them in the vocabulary
        ({"user_defined_symbols": ["<|im_start|>"]}, TEXTS[3]),  # seen in this document only
    ],
)
def test_a_model_that_transformers_reads_differently_is_refused(
    settings, text, source, tmp_path, capsys
):
    sentencepiece_model(tmp_path / "tok", **settings)
    assert main(pack_arguments(source, tmp_path / "tok", tmp_path / "c")) == 2
    error = capsys.readouterr().err
    assert "read its tokenizer.model alone differently" in error and repr(text)[:-1] in error
    assert "save_pretrained" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("c*"))


def test_a_tokenizer_that_draws_its_ids_is_refused(source, tmp_path, capsys):
    byte_level(tmp_path / "tok", eos_token="<eos>")
    file = tmp_path / "tok" / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["dropout"] = 0.2
    file.write_text(json.dumps(tree))
    assert main(pack_arguments(source, tmp_path / "tok", tmp_path / "c")) == 2
    assert "model.dropout=0.2" in capsys.readouterr().err


def test_a_slow_tokenizer_is_refused(source, tmp_path, capsys):
    gpt2_of_old_files(tmp_path / "tok")
    write_config(tmp_path / "tok", tokenizer_class="CTRLTokenizer")
    assert main(pack_arguments(source, tmp_path / "tok", tmp_path / "c")) == 2
    assert "as a fast tokenizer" in capsys.readouterr().err


# the hashes that a corpus knows its tokenizer by


def test_everything_that_changes_ids_changes_the_fingerprint(source, tmp_path):
    folder = tmp_path / "tok"
    with_a_config(folder)
    pack(source, folder, tmp_path / "c")
    corpus, config = Corpus.open(tmp_path / "c"), folder / "tokenizer_config.json"
    before = json.loads(config.read_text())
    model = hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    settings = json.dumps(before, sort_keys=True)
    written = f"tokenizer.model {model}\ntokenizer_config.json {settings}\n"
    assert corpus.manifest.tokenizer_fingerprint == hashlib.sha256(written.encode()).hexdigest()
    for change in ({"eos_token": "<unk>"}, {"add_prefix_space": False}):
        write_config(folder, **before | change)
        with pytest.raises(UserError, match="its settings are not those that the corpus"):
            corpus.check_tokenizer(folder)
    write_config(folder, **before | {"chat_template": "x", "model_max_length": 9})
    corpus.check_tokenizer(folder)
    (folder / "added_tokens.json").write_text('{"<x>": 420}')
    with pytest.raises(UserError, match="its settings are not those"):
        corpus.check_tokenizer(folder)
    # What the vocabulary is hashed by is as it was, and all that a manifest of old says.
    manifest = json.loads((tmp_path / "c.manifest.json").read_text())
    assert manifest.pop("tokenizer_fingerprint") and manifest["tokenizer_sha256"] == model
    (tmp_path / "c.manifest.json").write_text(json.dumps(manifest))
    Corpus.open(tmp_path / "c").check_tokenizer(folder)


# training


def train(folder, *more, out=None):
    paths = ("--input", str(folder / "a.txt"), "--out", str(out or folder / "tok"))
    assert main(["tokenizer", *paths, *more]) == 0


def test_text_around_a_reserved_character_is_trained_on(tmp_path):
    """sentencepiece leaves out every text that holds U+2585."""
    lines = [f"zebraquagga {i} \u2585 zebraquagga\n" for i in range(300)]
    (tmp_path / "a.txt").write_text("".join(lines) + CODE[:3000])
    train(tmp_path, "--vocab", "400")
    model = load_processor(tmp_path / "tok" / "tokenizer.model")
    assert len(model.encode("zebraquagga")) == 1
    assert model.decode(model.encode("a \u2585 b")) == "a \u2585 b"


def test_a_unigram_is_trained_on_text_that_holds_sentencepieces_space(tmp_path):
    draws = random.Random(0)
    lines = ["".join(draws.choice("ab\u2581 ") for _ in range(60)) for _ in range(400)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + CODE[:6000])
    train(tmp_path, "--vocab", "350", "--model-type", "unigram")
