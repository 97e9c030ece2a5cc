"""Data preparation, through its command line: text -> documents -> tokenizer -> packed corpus."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.tokenizer import _chunks
from est_ds.data.auto_tokenizer import load_processor
from est_ds.data.indexed import Corpus
from est_ds.data.tokenizer import tokenizer_fingerprint

ROOT = Path(__file__).resolve().parents[1]
STDLIB = Path(sysconfig.get_path("stdlib"))
UNUSUAL = "  leading\n\n\ttab é 好 😀 \u0301 x\r\n   \n1234567 <s> </s> <unk>\x0c end  "


def run(*arguments):
    """The command line, called in this process; must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


def refused(*arguments):
    """The command line, called in this process; must refuse. Returns its one line of error."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main([str(argument) for argument in arguments])
    said = err.getvalue()
    assert code == 2, (code, out.getvalue(), said)
    assert out.getvalue() == "" and said.startswith("error: "), (out.getvalue(), said)
    assert said.count("\n") == 1, said
    return said


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A small corpus of real source files, its tokenizer and its packed files."""
    root = tmp_path_factory.mktemp("prep") / "with a space"
    for name in ("json", "email", "asyncio", "unittest"):
        ignored = shutil.ignore_patterns("__pycache__", "test*")
        shutil.copytree(STDLIB / name, root / "src" / name, ignore=ignored)
    run("corpus", "--input", root / "src", "--out", root / "text", "--held-out", "0.1")
    run("tokenizer", "--input", root / "text.train.jsonl", "--out", root / "tok", "--vocab", "600")
    pack = ("pack", "--tokenizer", root / "tok", "--workers", "1")
    run(*pack, "--input", root / "text.train.jsonl", "--out", root / "train")
    return root


@pytest.fixture
def packed(prepared, tmp_path):
    """A copy of the packed corpus that a test may damage; its prefix."""
    for ending in ("bin", "idx", "manifest.json"):
        shutil.copy(prepared / f"train.{ending}", tmp_path)
    return tmp_path / "train"


# corpus


def test_corpus_keeps_every_document_once_and_sorted(prepared):
    source = prepared / "src"
    files = {path.relative_to(source).as_posix(): path for path in source.rglob("*.py")}
    train, valid = (records(prepared / f"text.{name}.jsonl") for name in ("train", "valid"))
    expected = {id_ for id_, path in files.items() if path.read_text(encoding="utf-8").strip()}
    for part in (train, valid):
        ids = [record["id"] for record in part]
        assert ids == sorted(ids) and ids
    assert Counter(record["id"] for record in train + valid) == Counter(expected)
    for record in train + valid:
        assert record["text"] == files[record["id"]].read_text(encoding="utf-8")


def test_held_out_side_of_a_document_depends_on_its_text_alone(tmp_path):
    texts = [f"document number {i}" for i in range(200)]
    sides = []
    for name, chosen in (("all", texts), ("some", texts[150:20:-1])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in chosen)
        )
        run(
            "corpus",
            "--input",
            tmp_path / f"{name}.jsonl",
            "--out",
            tmp_path / name,
            "--held-out",
            "0.2",
        )
        sides.append({r["text"] for r in records(tmp_path / f"{name}.valid.jsonl")})
    assert 20 <= len(sides[0]) <= 60
    assert sides[1] == sides[0] & set(texts[150:20:-1])


def test_corpus_reads_folders_of_txt_jsonl_and_py_together(tmp_path):
    folder = tmp_path / "in"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    (folder / "deep" / ".hidden" / "no.txt").write_text("hidden")
    (folder / "a.txt").write_bytes("\ufeffone\r\ntwo é".encode())
    (folder / "b.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    (folder / "broken.py").write_bytes(b"x = '\xe9'\n")
    (folder / "empty.txt").write_text(" \n")
    (folder / "notes.md").write_text("not read")
    lines = [json.dumps({"text": f"line {i}\u2028 same line", "meta": i}) for i in range(12)]
    (folder / "deep" / "c.jsonl").write_text("\n\n".join(lines))
    run("corpus", "--input", folder, "--out", tmp_path / "out", "--held-out", "0.3")
    found = records(tmp_path / "out.train.jsonl") + records(tmp_path / "out.valid.jsonl")
    expected = [("a.txt", "one\ntwo é"), ("b.py", "# coding: latin-1\nx = 'é'\n")]
    expected += [(f"deep/c.jsonl#{2 * i + 1}", f"line {i}\u2028 same line") for i in range(12)]
    assert sorted((r["id"], r["text"]) for r in found) == sorted(expected)


def test_default_corpus_is_the_standard_library_without_installed_packages(tmp_path):
    run("corpus", "--out", tmp_path / "std")
    held_out = records(tmp_path / "std.valid.jsonl")
    ids = [record["id"] for record in records(tmp_path / "std.train.jsonl") + held_out]
    assert {"json/decoder.py", "os.py"} <= set(ids) and len(ids) > 500
    assert not any("site-packages" in id_ or "dist-packages" in id_ for id_ in ids)
    assert 0 < len(held_out) < 0.05 * len(ids)


def test_too_few_documents_are_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "one.txt").write_text("alone")
    error = refused("corpus", "--input", tmp_path / "one.txt", "--out", tmp_path / "out")
    assert "--held-out=0.02 of 1 documents" in error and "more documents" in error
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{not json", "not JSON"),
        (b'"text"', "a JSON str, not an object"),
        (b'{"txt": "x"}', 'field "text" is missing'),
        (b'{"text": 3}', "is a int"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "UTF-8"),
    ],
)
def test_a_garbage_jsonl_line_is_named_by_file_and_line(tmp_path, capsys, line, says):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    assert main(["corpus", "--input", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{path}, line 3: " in error and says in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_inputs_are_refused_by_name(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "x.pdf").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "latin.txt").write_text("x")
    cases = {
        "latin.txt is not UTF-8": ["latin.txt"],
        "x.pdf: unknown kind of file": ["x.pdf"],
        "empty: no file in this folder": ["empty"],
        "nothing does not exist": ["nothing"],
        "is given twice": ["a", "a/latin.txt"],
    }
    for says, names in cases.items():
        inputs = [tmp_path / name for name in names]
        assert says in refused("corpus", "--input", *inputs, "--out", tmp_path / "o")
    assert "--held-out=2.0" in refused("corpus", "--out", tmp_path / "o", "--held-out", "2")
    assert "--held-out" in refused("corpus", "--out", tmp_path / "o", "--held-out", "x")
    assert "VERB" in refused()
    done = subprocess.run([sys.executable, "-m", "data_prep"], capture_output=True, cwd=ROOT)
    assert done.returncode == 2 and b"VERB" in done.stderr and b"Traceback" not in done.stderr


# tokenizer


def test_tokenizer_has_llamas_special_tokens_and_returns_text_unchanged(prepared):
    model = load_processor(prepared / "tok" / "tokenizer.model")
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert model.vocab_size() == 600
    for text in [UNUSUAL, *(record["text"] for record in records(prepared / "text.valid.jsonl"))]:
        assert model.decode(model.encode(text)) == text
    digits = [model.encode("\n" + digit)[-1] for digit in "123"]
    assert model.encode("\n123")[-3:] == digits


def test_hugging_face_encodes_as_sentencepiece_does(prepared):
    from transformers import AutoTokenizer, LlamaTokenizer

    loaded = AutoTokenizer.from_pretrained(prepared / "tok", local_files_only=True)
    model = load_processor(prepared / "tok" / "tokenizer.model")
    assert isinstance(loaded, LlamaTokenizer) and len(loaded) == 600
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    texts = ["", " ", "\n\n", UNUSUAL, "<0x0A> is no byte"]
    for part in ("train", "valid"):
        texts += [record["text"] for record in records(prepared / f"text.{part}.jsonl")]
    for text in texts:
        found = loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert found == model.encode(text)
    assert loaded("x = 1")["input_ids"] == [1, *model.encode("x = 1")]
    assert loaded.decode(model.encode(texts[-1])) == texts[-1]


def test_a_unigram_packs_as_hugging_face_encodes_and_as_likely_as_sentencepiece(prepared, tmp_path):
    from transformers import AutoTokenizer

    source, out = prepared / "text.train.jsonl", tmp_path / "tok"
    again = ("tokenizer", "--input", source, "--out", out, "--vocab", "600")
    run(*again, "--model-type", "unigram", "--sentences", "300")
    (tmp_path / "odd.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in (UNUSUAL, "<0x0A> is no byte"))
    )
    inputs = (prepared / "text.valid.jsonl", tmp_path / "odd.jsonl")
    run("pack", "--input", *inputs, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    stream = corpus.window(0, corpus.num_tokens)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tok", local_files_only=True)
    model = load_processor(tmp_path / "tok" / "spiece.model")
    starts = corpus.document_start(np.arange(corpus.num_documents + 1))
    texts = [r["text"] for path in reversed(inputs) for r in records(path)]
    for text, start, end in zip(texts, starts[:-1], starts[1:], strict=True):
        ids = stream[start:end].tolist()
        assert ids == [*loaded(text, split_special_tokens=True)["input_ids"], 2]
        assert model.decode(ids[1:-1]) == text
        best = sum(map(model.get_score, model.encode(text)))
        assert sum(map(model.get_score, ids[1:-1])) == pytest.approx(best, rel=1e-6)
    error = refused(*again)
    assert "holds a tokenizer of another kind (spiece.model)" in error


def test_tokenizer_training_is_deterministic(prepared, tmp_path):
    source = prepared / "text.train.jsonl"
    for name in ("a", "b"):
        run(
            "tokenizer",
            "--input",
            source,
            "--out",
            tmp_path / name,
            "--vocab",
            "400",
            "--sentences",
            "99",
        )
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_chunks_join_to_the_text_and_are_short():
    text = "\n".join("x" * (i * 37 % 2500) for i in range(60)) + UNUSUAL
    chunks = list(_chunks(text))
    assert "".join(chunks) == text and max(map(len, chunks)) <= 1000 and "" not in chunks


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a few words are not enough for so many pieces\n" * 9)
    tokenizer = ("tokenizer", "--input", tmp_path / "a.txt", "--out", tmp_path / "tok", "--vocab")
    assert "--vocab=5000 does not fit" in refused(*tokenizer, "5000")
    assert "--vocab=100 is not allowed" in refused(*tokenizer, "100")
    assert not (tmp_path / "tok").exists()


# pack and verify


def test_packed_documents_are_bos_text_eos_in_order(prepared):
    corpus = Corpus.open(prepared / "train")
    model = load_processor(prepared / "tok" / "tokenizer.model")
    stream = corpus.window(0, corpus.num_tokens)
    expected = [[1, *model.encode(r["text"]), 2] for r in records(prepared / "text.train.jsonl")]
    assert stream.tolist() == [token for document in expected for token in document]
    lengths, _, boundaries = corpus.shards[0].index
    assert lengths.tolist() == [len(document) for document in expected]
    assert boundaries.tolist() == list(range(len(expected) + 1))


def test_manifest_states_what_the_files_hold(prepared):
    manifest = json.loads((prepared / "train.manifest.json").read_text())
    texts = [r["text"] for r in records(prepared / "text.train.jsonl")]
    tokens = np.fromfile(prepared / "train.bin", "<u2")
    shares = np.unique(tokens, return_counts=True)[1] / tokens.size
    assert manifest.pop("unigram_entropy") == pytest.approx(-(shares * np.log(shares)).sum())
    assert manifest.pop("tokenizer_fingerprint") == tokenizer_fingerprint(prepared / "tok")
    hashed = {"bin": "train.bin", "idx": "train.idx", "tokenizer": "tok/tokenizer.model"}
    digests = {
        f"{name}_sha256": hashlib.sha256((prepared / path).read_bytes()).hexdigest()
        for name, path in hashed.items()
    }
    sizes = {"num_tokens": tokens.size, "num_documents": len(texts)}
    pair = {name: digests[f"{name}_sha256"] for name in ("bin", "idx")}
    assert manifest == {
        "format_version": 2,
        **sizes,
        "dtype": "uint16",
        "vocabulary": 600,
        "bos_id": 1,
        "eos_id": 2,
        "text_bytes": sum(len(text.encode()) for text in texts),
        "unknown_id": 0,
        "tokenizer_sha256": digests["tokenizer_sha256"],
        "part": "all",
        "held_out": None,
        "skipped": {},
        "sources": [{"path": [str(prepared / "text.train.jsonl")]}],
        "shards": [
            {"suffix": "", **sizes}
            | {f"{name}_bytes": (prepared / f"train.{name}").stat().st_size for name in pair}
            | {f"{name}_sha256": digest for name, digest in pair.items()}
        ],
    }


def test_packed_files_do_not_depend_on_workers(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.readers.delimited.PIECE_BYTES", 20_000)
    monkeypatch.setattr("data_prep.pack.PIECE_BYTES", 20_000)
    for workers in (2, 5):
        run(
            "pack",
            "--input",
            prepared / "text.train.jsonl",
            "--tokenizer",
            prepared / "tok",
            "--out",
            tmp_path / "p",
            "--workers",
            workers,
        )
        for ending in ("bin", "idx", "manifest.json"):
            expected = (prepared / f"train.{ending}").read_bytes()
            assert (tmp_path / f"p.{ending}").read_bytes() == expected


def test_verify_accepts_the_corpus_with_its_tokenizer(prepared, capsys):
    run("verify", "--out", prepared / "train", "--tokenizer", prepared / "tok")
    assert "ok" in capsys.readouterr().out
    run("verify", "--input", prepared / "train")


def test_verify_refuses_a_truncated_bin(packed):
    os.truncate(f"{packed}.bin", os.path.getsize(f"{packed}.bin") - 2)
    error = refused("verify", "--out", packed)
    assert f"{packed}.bin" in error and "truncated" in error and "data_prep pack" in error


def test_verify_refuses_a_changed_byte_in_either_file(packed):
    for ending in ("bin", "idx"):
        content = bytearray(Path(f"{packed}.{ending}").read_bytes())
        content[len(content) // 2] ^= 1
        original = Path(f"{packed}.{ending}").read_bytes()
        Path(f"{packed}.{ending}").write_bytes(content)
        assert f"{packed}.{ending}: sha256" in refused("verify", "--out", packed)
        Path(f"{packed}.{ending}").write_bytes(original)


def test_verify_refuses_another_tokenizer(prepared, packed, tmp_path):
    run(
        "tokenizer",
        "--input",
        prepared / "text.valid.jsonl",
        "--out",
        tmp_path / "tok",
        "--vocab",
        400,
    )
    error = refused("verify", "--out", packed, "--tokenizer", tmp_path / "tok")
    assert str(tmp_path / "tok") in error and "was made with" in error
    assert "tokenizer.model does not exist" in refused(
        "verify", "--out", packed, "--tokenizer", tmp_path
    )


def test_verify_refuses_a_missing_or_wrong_manifest(packed):
    manifest = Path(f"{packed}.manifest.json")
    content = json.loads(manifest.read_text())
    wrong = {
        "vocabulary": (content["vocabulary"] - 590, "outside the vocabulary 10"),
        "num_tokens": (content["num_tokens"] + 1, "num_tokens="),
        "unigram_entropy": (1.0, "unigram_entropy=1.0"),
        "format_version": (3, "format_version: "),
        "surplus": (0, "surplus: "),
    }
    for field, (value, says) in wrong.items():
        manifest.write_text(json.dumps(content | {field: value}))
        assert says in refused("verify", "--out", packed)
    manifest.unlink()
    assert "does not exist" in refused("verify", "--out", packed)


def test_pack_refuses_wrong_input_and_leaves_nothing(prepared, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.model").write_text("not a model")
    source, good = prepared / "text.train.jsonl", prepared / "tok"
    cases = [
        ("bad.jsonl, line 2", tmp_path / "in", good, tmp_path / "out", 1),
        ("not a sentencepiece model", source, tmp_path / "tok", tmp_path / "out", 1),
        ("tokenizer.model does not exist", source, tmp_path / "in", tmp_path / "out", 1),
        ("--workers=0", source, good, tmp_path / "out", 0),
        ("cannot make the folder", source, good, tmp_path / "in" / "bad.jsonl" / "out", 1),
    ]
    for says, inputs, tokenizer, out, workers in cases:
        pack = ("pack", "--input", inputs, "--tokenizer", tokenizer)
        assert says in refused(*pack, "--out", out, "--workers", workers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "tok"]
