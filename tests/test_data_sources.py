"""Sources of every kind give the same documents; data files say what to read."""

from __future__ import annotations

import ctypes
import gzip
import json
import subprocess
import sys

import datasets
import numpy as np
import pyarrow
import pytest
import yaml
import zstandard
from datasets import Dataset
from pyarrow import parquet

from conftest import ROOT
from data_prep.__main__ import main
from data_prep.config import Preparation, read_data_file
from data_prep.readers.base import Rules, Skipped
from data_prep.readers.delimited import DelimitedFile, Delimiter
from data_prep.readers.rows import ParquetFile
from data_prep.sources import open_sources, read_documents, walk
from est_ds.data.indexed import Corpus
from est_ds.errors import UserError

TEXTS = [f"document {i}: " + "naïve 好 text\n" * (i % 7) + "<|end|> </s>" for i in range(300)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch, tmp_path):
    """Pieces of a few documents, and a cache that is no user's."""
    for module in ("delimited", "rows"):
        monkeypatch.setattr(f"data_prep.readers.{module}.PIECE_BYTES", 2_000)
    monkeypatch.setattr("data_prep.readers.rows._ROWS_AT_ONCE", 8)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(texts=TEXTS, field="text"):
    return "".join(json.dumps({"id": 1, field: t}) + "\n" for t in texts).encode()


def write(folder, kind, texts=TEXTS, field="text"):
    """The texts in one file; its path."""
    path = folder / f"a.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        table = pyarrow.table({"id": range(len(texts)), field: texts})
        parquet.write_table(table, path, row_group_size=37)
    elif kind == "jsonl.gz":
        content = lines(texts, field)  # of two members, as `cat a.gz b.gz` makes
        path.write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]))
    elif kind == "jsonl.zst":
        content = lines(texts, field)
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(content[:5000]) + compress(content[5000:]))
    else:
        path.write_bytes(lines(texts, field))
    return path


def texts_of(**source):
    preparation = Preparation.model_validate({"sources": [source]})
    skipped = Skipped()
    readers = open_sources(preparation.sources)
    found = [document.text for document in read_documents(readers, Rules(), skipped)]
    assert set(skipped.counts) <= {"empty"}
    return found


def rest_of(reader, rules, number):
    """Texts that follow the piece of that number, read by a reader that starts there."""
    pieces = list(reader.pieces(None, rules))
    position = json.loads(json.dumps(pieces[number].position))
    skipped = Skipped()
    later = [d for p in reader.pieces(position, rules) for d in p.documents(rules, skipped)]
    whole = [d for p in pieces[number + 1 :] for d in p.documents(rules, skipped)]
    assert [d.id for d in later] == [d.id for d in whole] and len(pieces) > number + 2
    return [d.text for d in later], [d.text for d in whole]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_kind_of_file_gives_the_same_documents_from_any_piece_on(tmp_path, kind):
    path = write(tmp_path / "x", kind, field="content")
    assert texts_of(path=str(path), text="content") == TEXTS
    [source] = Preparation.model_validate(
        {"sources": [{"path": str(path), "text": "content"}]}
    ).sources
    for number in (0, 3, 7):
        [reader] = open_sources([source])
        later, whole = rest_of(reader, Rules(), number)
        assert later == whole == TEXTS[-len(whole) :]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", ["slimpajama", "starcoder", "openwebtext"])
def test_datasets_of_the_presets_layouts_load_through_the_library(tmp_path, layout, streaming):
    """The presets with a local folder of the same layout in place of the name on the Hub."""
    [preset] = read_data_file(ROOT / "configs" / "data" / f"{layout}.yaml").sources
    root = tmp_path / layout
    halves = [TEXTS[:140], TEXTS[140:]]
    for number, half in enumerate(halves):
        if layout == "slimpajama":
            folder, kind = root / "train" / f"chunk{number + 1}", "jsonl.zst"
        elif layout == "starcoder":
            folder, kind = root / preset.data_dir / f"{number}", "parquet"
        else:
            folder, kind = root / (preset.name or "plain_text") / f"train-{number}", "parquet"
        write(folder, kind, half, field=preset.text)
    fields = preset.model_dump(exclude_unset=True) | {
        "dataset": str(root),
        "streaming": streaming,
        "revision": None,
        "name": None,
    }
    assert texts_of(**fields) == TEXTS
    [source] = Preparation.model_validate({"sources": [fields]}).sources
    [reader] = open_sources([source])
    later, whole = rest_of(reader, Rules(), 4)
    assert later == whole == TEXTS[-len(whole) :]


def test_a_dataset_that_cannot_be_loaded_is_refused_by_name(tmp_path):
    Dataset.from_dict({"content": ["a"], "size": [3]}).to_parquet(tmp_path / "d" / "a.parquet")
    for fields, says in (
        ({"dataset": str(tmp_path / "nothing")}, "cannot be loaded"),
        ({"dataset": str(tmp_path / "d"), "split": "test"}, "cannot be loaded"),
        ({"dataset": str(tmp_path / "d")}, "column 'text' is missing; it has content, size"),
        ({"dataset": str(tmp_path / "d"), "text": "size"}, "'size' holds int64"),
    ):
        with pytest.raises(ValueError, match=says):
            texts_of(**fields)


def test_folders_globs_and_links_are_read_in_the_order_of_names(tmp_path):
    for name in ("b/1", "a/2", "a/1"):
        write(tmp_path / "in" / name, "jsonl", [name])
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere", "jsonl", ["linked"])
    assert texts_of(path=str(tmp_path / "in")) == ["a/1", "a/2", "b/1"]
    assert texts_of(path=str(tmp_path / "in" / "*" / "1" / "*.jsonl")) == ["a/1", "b/1"]
    assert texts_of(path=str(tmp_path / "in" / "**" / "*.jsonl")) == ["a/1", "a/2", "b/1"]
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    assert texts_of(path=str(tmp_path / "in")) == ["a/1", "a/2", "b/1", "linked"]


def test_sources_are_read_one_after_the_other_also_with_equal_names(tmp_path):
    for name in ("z", "y"):
        write(tmp_path / name, "jsonl", [name])
    sources = [{"path": str(tmp_path / name)} for name in ("z", "y")]
    preparation = Preparation.model_validate({"sources": sources})
    documents = list(read_documents(open_sources(preparation.sources), Rules(), Skipped()))
    assert [d.text for d in documents] == ["z", "y"] and len({d.id for d in documents}) == 2


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "\na\n", "ab", "x"])
@pytest.mark.parametrize("line_ends", [["\n"], ["\r\n"], ["\n", "\r\n"]])
def test_separated_text_does_not_depend_on_where_pieces_begin(tmp_path, separator, line_ends):
    draws = np.random.default_rng(0)
    alphabet = ["a", "b", "x", "é", separator, *line_ends]
    content = "".join(draws.choice(alphabet) for _ in range(20_000))
    if "\n" not in line_ends:
        content = content.replace("\r\n", "\n").replace("\n", "\r\n")
    path = tmp_path / "a.txt"
    path.write_text(content, newline="")
    parts = content.replace("\r\n", "\n").split(separator)
    expected = [part for part in parts if part.strip()]
    assert texts_of(path=str(path), separator=separator) == expected
    windows = separator.replace("\n", "\r\n")
    assert texts_of(path=str(path), separator=windows) == expected
    reader = DelimitedFile("a", path, None, Delimiter(separator.encode(), any_line_end=True))
    for number in (0, 2, 4):
        later, whole = rest_of(reader, Rules(), number)
        assert later == whole


@pytest.mark.parametrize("limit", [40, 1000, 5000])
def test_a_document_above_the_limit_is_counted_and_the_others_stay(tmp_path, limit):
    texts = ["a" * 10, "b" * 8000, "c" * 20, "d" * 3000, "e" * 30, "f" * 9000]
    path = write(tmp_path, "jsonl", texts)
    reader = DelimitedFile("a", path, "text")
    rules, skipped = Rules(limit), Skipped()
    documents = [d for p in reader.pieces(None, rules) for d in p.documents(rules, skipped)]
    kept = [t for t in texts if len(json.dumps({"id": 1, "text": t})) <= limit]
    assert [d.text for d in documents] == kept
    assert skipped.counts == {"too long": len(texts) - len(kept)} and len(kept) < 6
    assert skipped.first == {"too long": "a#2"}
    assert [d.id for d in documents] == [f"a#{1 + texts.index(t)}" for t in kept]


def test_damaged_files_are_refused_by_name(tmp_path, capsys):
    for kind in ("jsonl.gz", "jsonl.zst", "parquet"):
        path = write(tmp_path / kind, kind)
        for damage in ("cut", "overwritten"):
            content = path.read_bytes()
            at = len(content) * 2 // 3
            path.write_bytes(content[:at] + (b"\0" * 50 + content[at + 50 :]) * (damage != "cut"))
            out = tmp_path / "out"
            code = main(["corpus", "--input", str(path), "--out", str(out), "--held-out", "0.5"])
            error = capsys.readouterr().err
            assert code == 2 and f"--input: {path}" in error, (kind, damage, error)
            path.write_bytes(content)


def test_broken_links_and_unreadable_files_are_never_passed_over(tmp_path):
    folder = tmp_path / "in"
    write(folder, "jsonl")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="gone.txt is a broken link"):
        texts_of(path=str(folder))
    (folder / "gone.txt").unlink()
    (folder / "secret").mkdir()
    write(folder / "secret", "jsonl")
    command = [sys.executable, "-m", "data_prep", "corpus", "--input", folder, "--out", "/dev/null"]
    for path in (folder / "secret" / "a.jsonl", folder / "secret"):
        path.chmod(0)
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, preexec_fn=_bound_by_permissions
        )
        path.chmod(0o755)
        assert done.returncode == 2, done.stderr
        assert f"--input: {path} cannot be read" in done.stderr and "Traceback" not in done.stderr


def _bound_by_permissions():
    """Root loses the two capabilities that let it read whatever it likes; others never had them."""
    drop_from_bounding_set = 24
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)


def test_files_of_other_kinds_are_counted_aloud(tmp_path, capsys):
    write(tmp_path, "jsonl")
    for name in ("readme.md", "b.json", "c.json"):
        (tmp_path / name).write_text("x")
    assert texts_of(path=str(tmp_path)) == TEXTS
    said = capsys.readouterr().out
    assert "3 files of other kinds are not read (2 .json, 1 .md)" in said and "--plain" in said


def test_files_of_other_endings_are_read_as_text_where_they_are_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("1==2")
    (tmp_path / "b.md").write_text("3==4")
    (tmp_path / "c.c").write_text("5")
    read = {"path": str(tmp_path), "plain": (".md", ".c")}
    assert texts_of(**read) == ["1==2", "3==4", "5"]
    assert texts_of(**read, separator="==") == ["1", "2", "3", "4", "5"]
    assert "the separator was not found in c.c: one document" in capsys.readouterr().out
    command = ["corpus", "--out", str(tmp_path / "o"), "--input", str(tmp_path / "b.md")]
    assert main(command) == 2 and "--plain .md reads it as text" in capsys.readouterr().err
    assert main([*command, "--plain", "md"]) == 2
    assert "error: --plain='md': an ending begins with a dot" in capsys.readouterr().err
    assert main([*command, "--plain", ".rs"]) == 2
    assert "b.md: unknown kind of file" in capsys.readouterr().err


def test_a_separator_that_is_nowhere_is_said(tmp_path, tokenizer, capsys):
    (tmp_path / "a.txt").write_bytes(b"first\r\n\r\nsecond\r\n\r\nthird\r\n")
    command = ["pack", "--input", str(tmp_path / "a.txt"), "--tokenizer", str(tokenizer)]
    for separator, documents in ((r"\n\n", 3), (r"\r\n\r\n", 3), ("<|end|>", 1)):
        out = str(tmp_path / "c")
        assert main([*command, "--out", out, "--separator", separator, "--no-eos"]) == 0
        said = capsys.readouterr().out
        assert Corpus.open(out).num_documents == documents
        assert ("the separator was not found in a.txt" in said) == (documents == 1)
        assert "no EOS: nothing ends a document" in said


@pytest.mark.parametrize("verb", ["corpus", "tokenizer", "pack"])
def test_a_missing_field_is_answered_with_its_flag_and_skips_with_their_reasons(
    verb, tokenizer, tmp_path, capsys
):
    (tmp_path / "a.jsonl").write_text('{"id": "x", "content": "a longer text"}\n' * 5)
    command = [verb, "--input", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "o")]
    if verb == "pack":
        command += ["--tokenizer", str(tokenizer), "--held-out", "0.5"]
    assert main(command) == 2
    assert "name the field with the text (--text content" in capsys.readouterr().err
    assert main([*command, "--invalid", "skip"]) == 2
    error = capsys.readouterr().err
    assert "no document is left, all were left out: 5 invalid" in error
    assert "--held-out" not in error and error.count("\n") == 1


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="2 columns 'text'"):
        list(ParquetFile("a", tmp_path / "a.parquet", "text").pieces(None, Rules()))


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=str)
def test_data_file_is_valid(file):
    assert read_data_file(file).sources


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"sources": []}, "sources"),
        ({"sources": [{}]}, "needs either path"),
        ({"sources": [{"path": "x", "dataset": "y"}]}, "needs either path"),
        ({"sources": [{"path": "x", "split": "train"}]}, "split has no effect"),
        ({"sources": [{"dataset": "x", "separator": "y"}]}, "separator has no effect"),
        ({"sources": [{"path": "x", "txt": "y"}]}, "did you mean 'text'"),
        ({"sources": [{"path": "x"}], "tokeniser": "y"}, "did you mean 'tokenizer'"),
        ({"sources": [{"path": "x"}], "held_out": 1.5}, "held_out"),
        ({"sources": [{"path": "x"}], "invalid": "ignore"}, "invalid"),
        ([1], "a mapping"),
    ],
)
def test_wrong_data_files_are_refused(tmp_path, capsys, tree, says):
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert main(["pack", "--config", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error and str(file) in error and error.count("\n") == 1


def test_a_stream_that_breaks_off_is_a_failure_that_can_be_continued(
    tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("data_prep.packing.COMMIT_EVERY_S", 0.0)
    monkeypatch.setattr("data_prep.pack.PIECE_BYTES", 2_000)
    write(tmp_path / "d" / "0", "jsonl.zst", TEXTS[:140])
    second = write(tmp_path / "d" / "1", "jsonl.zst", TEXTS[140:])
    whole = second.read_bytes()
    source = {"dataset": "json", "data_files": str(tmp_path / "d" / "*" / "*.zst")}
    file = tmp_path / "x.yaml"
    file.write_text(
        yaml.safe_dump({"sources": [source | {"streaming": True}], "tokenizer": str(tokenizer)})
    )
    command = ["pack", "--config", str(file), "--workers", "1", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    second.write_bytes(b"not compressed")
    assert main([*command, str(tmp_path / "c")]) == 1
    said = capsys.readouterr()
    assert "reading stopped after row" in said.err and "keeps what is packed" in said.err
    second.write_bytes(whole)
    assert main([*command, str(tmp_path / "c")]) == 0
    assert "going on after" in capsys.readouterr().out
    for ending in ("bin", "idx"):
        expected = (tmp_path / f"whole.{ending}").read_bytes()
        assert (tmp_path / f"c.{ending}").read_bytes() == expected


def test_wrong_flags_are_refused_by_their_names(tokenizer, tmp_path, capsys):
    path = write(tmp_path / "in", "jsonl")
    pack = ["pack", "--out", str(tmp_path / "c"), "--tokenizer", str(tokenizer)]
    for arguments, says in (
        ([*pack], "--input is missing"),
        ([*pack, "--input", str(path), "--held-out", "0"], "--held-out=0.0"),
        ([*pack, "--input", str(path), "--shard-tokens", "0"], "--shard-tokens=0"),
        ([*pack[:3], "--input", str(path)], "--tokenizer is missing"),
        (["pack", "--out", f"{tmp_path}/", *pack[3:], "--input", str(path)], "is a folder"),
        (["corpus", "--input", str(path.parent), "--out", f"{path.parent}/x"], "lies in the"),
        (["verify", "--out", str(path.with_suffix(".idx"))], "does not exist"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    assert not list(tmp_path.glob("c*"))


def test_settings_that_no_file_takes_up_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    write(tmp_path, "jsonl")
    with pytest.raises(ValueError, match="text='body' has no effect"):
        texts_of(path=str(tmp_path / "a.txt"), text="body")
    with pytest.raises(ValueError, match="separator='x' has no effect"):
        texts_of(path=str(tmp_path / "a.jsonl"), separator="x")


def test_a_data_file_packs_and_flags_go_before_it(tokenizer, tmp_path, capsys):
    path = write(tmp_path / "x", "jsonl.zst", field="content")
    file = tmp_path / "x.yaml"
    tree = {
        "sources": [{"path": str(path), "text": "content"}],
        "tokenizer": str(tokenizer),
        "bos": False,
        "held_out": 0.2,
    }
    file.write_text(yaml.safe_dump(tree))
    command = ["pack", "--config", str(file), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    sizes = [Corpus.open(f"{tmp_path}/out.{part}").num_documents for part in ("train", "valid")]
    assert sum(sizes) == 300 and 30 < sizes[1] < 90
    assert Corpus.open(f"{tmp_path}/out.train").manifest.bos_id is None
    assert main([*command, "--held-out", "0.5", "--bos"]) == 0
    valid = Corpus.open(f"{tmp_path}/out.valid")
    assert valid.num_documents > 100 and valid.manifest.bos_id == 1
    capsys.readouterr()
    assert main([*command, "--input", str(path)]) == 2
    assert "--input beside --config" in capsys.readouterr().err


def test_order_of_a_folder_with_links_is_not_the_file_systems(tmp_path):
    found = []
    for order in (("b", "zz"), ("zz", "b")):
        root = tmp_path / "-".join(order)
        for name in order:
            (root / name).mkdir(parents=True)
        (root / "zz" / "d").mkdir()
        (root / "zz" / "d" / "x.txt").write_text("x")
        (root / "b" / "c").symlink_to(root / "zz" / "d")
        (root / "m.txt").write_text("m")
        found.append([path.relative_to(root).as_posix() for path in walk(root)])
    assert found[0] == found[1] == ["m.txt", "zz/d/x.txt"]


def test_folder_beside_a_link_to_it_is_read_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert list(walk(tmp_path)) == [tmp_path / "a" / "x.txt"]


def test_shard_is_not_taken_for_a_corpus(tmp_path):
    (tmp_path / "c.manifest.json").write_text("{}")
    with pytest.raises(UserError, match="one shard of"):
        Corpus.open(tmp_path / "c-00001")


def test_empty_compressed_file_is_an_error(tmp_path):
    (tmp_path / "a.jsonl.gz").touch()
    with pytest.raises(UserError, match="no compressed file"):
        list(DelimitedFile("a", tmp_path / "a.jsonl.gz", "text").pieces(None, Rules()))


def test_parquet_text_that_is_not_utf_8_is_named_or_skipped(tmp_path):
    raw = pyarrow.array([b"good", b"\xff\xfe", b"fine"], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": raw.view(pyarrow.string())}), tmp_path / "a.parquet")
    [piece] = ParquetFile("a", tmp_path / "a.parquet", "text").pieces(None, Rules())
    with pytest.raises(UserError, match="row 1"):
        list(piece.documents(Rules(), Skipped()))
    skipped = Skipped()
    assert [d.text for d in piece.documents(Rules(invalid="skip"), skipped)] == ["good", "fine"]
    assert sum(skipped.counts.values()) == 1
