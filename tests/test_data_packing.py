"""Packing at scale: shards, any number of workers, any tokenizer, other readers of the format."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import ROOT, est_ds, train
from data_prep.__main__ import main
from est_ds.data.encoders import load_encoder
from est_ds.data.indexed import Corpus
from packings import files_of, pack, pack_arguments, source, texts  # noqa: F401

# shards


def test_shards_are_one_stream_and_none_splits_a_document(source, tokenizer, texts, tmp_path):
    pack(source, tokenizer, tmp_path / "one")
    pack(source, tokenizer, tmp_path / "many", "--shard-tokens", "9000")
    one, many = Corpus.open(tmp_path / "one"), Corpus.open(tmp_path / "many")
    assert len(one.shards) == 1 and len(many.shards) > 5
    sizes = [shard.num_tokens for shard in many.manifest.shards]
    longest = max(len(t.encode()) for t in texts)
    assert min(sizes[:-1]) >= 9000 and max(sizes) < 9000 + longest
    stream = one.window(0, one.num_tokens)
    assert many.window(0, many.num_tokens).tolist() == stream.tolist()
    draws = np.random.default_rng(0)
    for start in draws.integers(0, one.num_tokens, 50):
        length = int(draws.integers(0, one.num_tokens - start))
        assert (many.window(start, length) == stream[start : start + length]).all()
    assert not {".bin", ".idx"} & set(files_of(tmp_path / "many"))
    (tmp_path / "copy").mkdir()
    for ending, content in files_of(tmp_path / "many").items():
        (tmp_path / "copy" / f"renamed{ending}").write_bytes(content)
    assert Corpus.open(tmp_path / "copy" / "renamed").fingerprint == many.fingerprint


@pytest.mark.parametrize("shard_tokens", [3000, 1 << 31])
def test_documents_begin_where_bos_stands(source, tokenizer, tmp_path, shard_tokens):
    pack(source, tokenizer, tmp_path / "c", "--shard-tokens", shard_tokens)
    corpus = Corpus.open(tmp_path / "c")
    stream = corpus.window(0, corpus.num_tokens)
    expected = [*np.flatnonzero(stream == 1), corpus.num_tokens]
    assert corpus.document_start(np.arange(corpus.num_documents + 1)).tolist() == expected
    assert corpus.document_start(np.array([[7, 3], [400, 7]])).tolist() == [
        [expected[7], expected[3]],
        [corpus.num_tokens, expected[7]],
    ]
    assert int(corpus.document_start(5)) == expected[5]


def test_repacking_in_fewer_shards_leaves_no_old_one(source, tokenizer, tmp_path):
    pack(source, tokenizer, tmp_path / "c", "--shard-tokens", "3000")
    assert len(files_of(tmp_path / "c")) > 10
    pack(source, tokenizer, tmp_path / "c")
    assert set(files_of(tmp_path / "c")) == {".bin", ".idx", ".manifest.json"}


def test_an_altered_or_missing_shard_is_found(source, tokenizer, tmp_path, capsys):
    prefix = tmp_path / "c"
    pack(source, tokenizer, prefix, "--shard-tokens", "9000")
    shard = tmp_path / "c-00002.bin"
    content = shard.read_bytes()

    def refusals(workers="1"):
        assert main(["verify", "--out", str(prefix), "--workers", workers]) == 2
        yield capsys.readouterr().err
        try:
            Corpus.open(prefix).check_hashes()
        except ValueError as error:
            yield str(error)

    Corpus.open(prefix).check_hashes()
    assert main(["verify", "--out", str(prefix), "--workers", "2"]) == 0
    shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    Corpus.open(prefix)
    assert all("c-00002.bin: sha256" in r for r in refusals("2")) and len(list(refusals())) == 2
    shard.write_bytes(content[:-2])
    assert all("c-00002.bin" in r and "truncated" in r for r in refusals())
    with pytest.raises(ValueError, match="truncated"):
        Corpus.open(prefix)
    shard.unlink()
    assert all("c-00002.bin does not exist" in r for r in refusals())
    Path(f"{prefix}.manifest.json").unlink()
    with pytest.raises(ValueError, match="its shards are there, but not .*c.manifest.json"):
        Corpus.open(prefix)


def test_held_out_documents_are_chosen_as_the_verb_corpus_does(source, tokenizer, texts, tmp_path):
    whole = str(tmp_path / "c")
    pack(source, tokenizer, whole, "--held-out", "0.2", "--shard-tokens", "9000")
    inputs = ["--input", str(source)]
    assert main(["corpus", *inputs, "--out", whole, "--held-out", "0.2"]) == 0
    total = 0
    for part in ("train", "valid"):
        pack(f"{whole}.{part}.jsonl", tokenizer, f"{whole}.again")
        again, split = Corpus.open(f"{whole}.again"), Corpus.open(f"{whole}.{part}")
        assert again.window(0, again.num_tokens).tolist() == (
            split.window(0, split.num_tokens).tolist()
        )
        assert (split.manifest.part, split.manifest.held_out) == (part, 0.2)
        total += split.num_documents
    assert total == len(texts)


# documents that are left out


def test_documents_left_out_are_counted_and_named(tokenizer, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(
        b'{"text": "fine"}\n{"text": " "}\n{"text": "\xff"}\nnot json\n'
        + json.dumps({"text": "x" * 999}).encode()
    )
    (folder / "b.txt").write_bytes(b"\xff\xfe")
    (folder / "c.txt").write_bytes(b"")
    (folder / "d.txt").write_text("y" * 999)
    arguments = pack_arguments(folder, tokenizer, tmp_path / "c", "--max-document-bytes", "100")
    assert main(arguments) == 2
    assert "a.jsonl, line 3" in capsys.readouterr().err
    assert main([*arguments, "--invalid", "skip"]) == 0
    manifest = Corpus.open(tmp_path / "c").manifest
    assert manifest.num_documents == 1
    assert manifest.skipped == {"empty": 2, "invalid": 3, "too long": 2}
    said = capsys.readouterr().out
    assert "2 empty (the first: a.jsonl#2); 3 invalid (the first: a.jsonl#3)" in said
    assert "2 too long (the first: a.jsonl#5)" in said


def test_a_document_of_more_tokens_than_the_index_can_say_is_counted(
    source, tokenizer, tmp_path, monkeypatch, texts
):
    encoder = load_encoder(tokenizer)
    lengths = np.array([len(ids) + 2 for ids in encoder.encode(texts)])
    limit = int(np.median(lengths))
    monkeypatch.setattr("data_prep.tokenizing._MAX_TOKENS", limit)
    pack(source, tokenizer, tmp_path / "c", "--workers", "1")
    manifest = Corpus.open(tmp_path / "c").manifest
    assert manifest.skipped == {"too long": int((lengths > limit).sum())}
    assert manifest.num_tokens == lengths[lengths <= limit].sum()


# tokenizers of Hugging Face


@pytest.fixture(scope="session")
def gpt2_like(tmp_path_factory):
    """A byte-level BPE with one token that is BOS and EOS, as GPT-2's."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [(ROOT / "est_ds" / "config" / "sections.py").read_text()],
        trainers.BpeTrainer(
            vocab_size=600,
            initial_alphabet=alphabet,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
        ),
    )
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end
    ).save_pretrained(folder)
    return folder


def test_a_hugging_face_tokenizer_packs_as_the_library_encodes(
    gpt2_like, source, texts, tmp_path, capsys
):
    pack(source, gpt2_like, tmp_path / "c", "--workers", "2")
    loaded = AutoTokenizer.from_pretrained(gpt2_like)
    corpus = Corpus.open(tmp_path / "c")
    end = loaded.eos_token_id
    expected = [i for t in texts for i in [*loaded(t, split_special_tokens=True)["input_ids"], end]]
    assert corpus.window(0, corpus.num_tokens).tolist() == expected
    assert (corpus.manifest.bos_id, corpus.manifest.eos_id) == (None, end)
    corpus.check_tokenizer(gpt2_like)
    assert main(["verify", "--out", str(tmp_path / "c"), "--tokenizer", str(gpt2_like)]) == 0
    said = capsys.readouterr().out
    assert "no BOS around documents; 100 % of the documents end with EOS" in said
    assert "0 % of the tokens unknown" in said  # its unknown token is its EOS


def test_special_tokens_spelled_in_a_text_stay_text(gpt2_like, tokenizer, tmp_path):
    for name, path, text in (("hf", gpt2_like, "a<|endoftext|>b"), ("sp", tokenizer, "a</s>b<s>")):
        (tmp_path / "a.txt").write_text(text)
        pack(tmp_path / "a.txt", path, tmp_path / name)
        corpus = Corpus.open(tmp_path / name)
        ids = corpus.window(0, corpus.num_tokens).tolist()
        assert ids.count(corpus.manifest.eos_id) == 1
        assert AutoTokenizer.from_pretrained(path).decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "int32")])
def test_a_vocabulary_above_65536_is_packed_in_four_bytes(tmp_path, size, dtype):
    vocabulary = {f"w{i}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(
        tmp_path / "tok"
    )
    last = size - 1
    (tmp_path / "a.txt").write_text(f"w{last} w7 w{last - 1}")
    pack(tmp_path / "a.txt", tmp_path / "tok", tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.window(0, 3).tolist() == [last, 7, last - 1]
    assert corpus.manifest.dtype == corpus.shards[0].header.dtype.name == dtype
    reader = MMapIndexedDataset(str(tmp_path / "c"), skip_warmup=True)
    assert reader[0].tolist() == [last, 7, last - 1]


def test_a_tokenizer_without_bos_is_not_asked_for_one(gpt2_like, source, tmp_path, capsys):
    tokenizer = json.loads((gpt2_like / "tokenizer_config.json").read_text())
    shutil.copytree(gpt2_like, tmp_path / "tok")
    tokenizer.pop("bos_token")
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    arguments = pack_arguments(source, tmp_path / "tok", tmp_path / "c", "--bos")
    assert main(arguments) == 2
    assert "--bos: this tokenizer has no BOS token" in capsys.readouterr().err


# other implementations of the format


@pytest.mark.parametrize("shard_tokens", ["9000", "2147483648"])
def test_what_we_write_is_read_by_deepspeeds_own_reader(
    source, tokenizer, texts, tmp_path, shard_tokens
):
    pack(source, tokenizer, tmp_path / "c", "--shard-tokens", shard_tokens)
    corpus, found = Corpus.open(tmp_path / "c"), []
    for shard in corpus.shards:
        reader = MMapIndexedDataset(shard.header.prefix, skip_warmup=True)
        assert reader.doc_idx.tolist() == list(range(len(reader) + 1))
        assert reader.sizes.tolist() == [len(reader[i]) for i in range(len(reader))]
        found += [reader[i].tolist() for i in range(len(reader))]
    encoded = load_encoder(tokenizer).encode(texts)
    assert found == [[1, *ids, 2] for ids in encoded]


def megatron_files(prefix, documents, code, dtype):
    """Bytes as Megatron-LM's description of its IndexedDataset has them: a document is a list of
    sequences."""
    sequences = [s for document in documents for s in document]
    ends = np.cumsum([0] + [len(document) for document in documents])
    sizes = [len(s) for s in sequences]
    pointers = np.cumsum([0] + [n * np.dtype(dtype).itemsize for n in sizes])[:-1]
    Path(f"{prefix}.bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", len(sequences))
        + struct.pack("<Q", len(ends))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(sizes)}q", *pointers)
        + struct.pack(f"<{len(ends)}q", *ends)
    )


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8"), (1, "u1")])
def test_a_corpus_of_megatron_reads_token_by_token(tmp_path, code, dtype):
    draws = np.random.default_rng(3)
    documents = [
        [draws.integers(0, 200, length).tolist() for length in draws.integers(1, 40, sequences)]
        for sequences in draws.integers(0, 4, 50)
    ]
    megatron_files(tmp_path / "m", documents, code, dtype)
    corpus = Corpus.open(tmp_path / "m")
    whole = [[token for s in document for token in s] for document in documents]
    stream = [token for document in whole for token in document]
    assert corpus.num_tokens == len(stream) and corpus.num_documents == 50
    for start in range(len(stream)):
        assert corpus.window(start, 1)[0] == stream[start]
    assert corpus.window(0, len(stream)).tolist() == stream
    starts = np.cumsum([0] + [len(document) for document in whole]).tolist()
    assert corpus.document_start(np.arange(51)).tolist() == starts
    assert corpus.manifest is None


# audit


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ([[1, 5, 2], [1, 6, 2], [7, 2]], "only 66.6667 % of the documents start with BOS (1)"),
        ([[1, 5, 2], [1, 6, 2], [1, 7]], "only 66.6667 % of the documents end with EOS (2)"),
        ([[1, 1, 5, 2], [1, 6, 2]], "1 documents start with two BOS (1)"),
        ([[1, 5, 2], [1, 6, 2, 2]], "1 documents end with two EOS (2)"),
        ([[1, 5, 2, 7, 2], [1, 6, 2]], "EOS (2) stands 1 times inside documents"),
        ([[1, 5, 0, 2], [1, 6, 2]], "14.2857 % of the tokens unknown (0), more than --max-unknown"),
        ([[1, 5, 2], [1, 600, 2]], "token 600 is outside the vocabulary 512"),
        ([[1, 5, 2], [1, 6, 2]], None),
        ([[5, 2], [6, 2]], None),
        ([[5, 3], [6, 7]], None),
    ],
)
def test_the_audit_finds_how_documents_were_made(tokenizer, tmp_path, capsys, documents, says):
    megatron_files(tmp_path / "m", [[d] for d in documents], 8, "<u2")
    code = main(["verify", "--out", str(tmp_path / "m"), "--tokenizer", str(tokenizer)])
    said = capsys.readouterr()
    if says is None:
        assert code == 0 and "no manifest: hashes" in said.out
    else:
        assert code == 2 and says in said.err and said.err.count("\n") == 1


def test_the_audit_holds_the_manifest_to_its_bos_and_density(source, tokenizer, tmp_path, capsys):
    prefix = tmp_path / "c"
    pack(source, tokenizer, prefix, "--no-bos")
    verify = ["verify", "--out", str(prefix)]
    assert main(verify) == 0
    assert "no BOS around documents" in capsys.readouterr().out
    assert main([*verify, "--min-bytes-per-token", "9"]) == 2
    assert "fewer than --min-bytes-per-token=9" in capsys.readouterr().err
    manifest = Path(f"{prefix}.manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"bos_id": 1}))
    assert main(verify) == 2
    assert "only 0 % of the documents start with BOS (1)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_trains_and_exports_with_a_hugging_face_tokenizer(
    gpt2_like, corpus, tiny_run, tmp_path
):
    for part in ("train", "valid"):
        pack(corpus / f"text.{part}.jsonl", gpt2_like, tmp_path / part, "--shard-tokens", "30000")
    assert len(Corpus.open(tmp_path / "train").shards) > 1
    run_dir = tmp_path / "run"
    fields = (f"data.train={tmp_path}/train", f"data.valid={tmp_path}/valid")
    settings = (
        "steps=2",
        "method.name=full",
        "model.vocab_size=600",
        "parallel.pipe=1",
        "checkpoint.every=2",
        "evaluate.every=2",
    )
    settings += (f"data.tokenizer={gpt2_like}",)
    done = train(tiny_run, f"run_dir={run_dir}", *fields, *settings, processes=1)
    assert done.returncode == 0, done.stderr
    done = est_ds("export", run_dir)
    assert done.returncode == 0, done.stderr
    text = "def f(x):\n    return"
    exported, trained = (AutoTokenizer.from_pretrained(p) for p in (run_dir / "export", gpt2_like))
    assert exported(text)["input_ids"] == trained(text)["input_ids"]
