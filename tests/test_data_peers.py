"""Corpora of other tools, and other tools on ours: the packages themselves write and read.

They are the extra `peers`: `pip install -e '.[peers]'`.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from transformers import AutoTokenizer

from cases.tiny import TINY_RUN
from conftest import run_command
from data_prep.__main__ import main
from est_ds import cli
from est_ds.data.auto_tokenizer import plain_ids
from est_ds.data.header import read_header
from est_ds.data.indexed import Corpus
from packings import pack, pack_arguments, source, texts  # noqa: F401
from workers import train_all

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer

_, texts, tokenizer, eos, out = sys.argv
writer = MegatronDocumentTokenizer(out, tokenizer_name_or_path=tokenizer, eos_token=eos or None)
steps = [ParquetReader(texts), writer]
LocalPipelineExecutor(pipeline=steps, tasks=2, logging_dir=f"{out}/logs").run()
"""
MEGATRON_WRITES = """
import json, sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

_, prefix, dtype, documents = sys.argv
builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(numpy, dtype))
for document in json.load(open(documents)):
    for sequence in document:
        builder.add_item(torch.tensor(sequence))
    builder.end_document()
builder.finalize(f"{prefix}.idx")
"""
MEGATRON_JOINS = """
import sys
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

_, prefix, *parts = sys.argv
dtype = IndexedDataset(parts[0]).index.dtype
builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
for part in parts:
    builder.add_index(part)
builder.finalize(f"{prefix}.idx")
"""
MEGATRON_READS = """
import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset

data = IndexedDataset(sys.argv[1])
documents = [data[i].tolist() for i in range(len(data))]
print(json.dumps([str(data.index.dtype), data.document_indices.tolist(), documents]))
"""
needs_datatrove = pytest.mark.skipif(not find_spec("datatrove"), reason="needs the extra `peers`")
needs_megatron = pytest.mark.skipif(not find_spec("megatron"), reason="needs the extra `peers`")


def python(script: str, *arguments) -> str:
    done = run_command(sys.executable, "-c", script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents_of(prefix) -> list[list[int]]:
    corpus = Corpus.open(prefix)
    starts = corpus.document_start(np.arange(corpus.num_documents + 1)).tolist()
    stream = corpus.window(0, corpus.num_tokens).tolist()
    return [stream[start:end] for start, end in zip(starts[:-1], starts[1:])]


# the header, without the packages


def test_type_codes_are_those_of_the_reader_that_is_asked_for(source, tmp_path, capsys):
    tokenizer = tmp_path / "tokenizer"
    file = source / "0.jsonl"
    size = ("--vocab", "400", "--model-type", "bytes", "--out", str(tokenizer))
    assert main(["tokenizer", "--input", str(file), *size]) == 0
    pack(file, tokenizer, tmp_path / "theirs", "--type-codes", "megatron")
    pack(file, tokenizer, tmp_path / "ours")
    assert read_header(tmp_path / "theirs").type_code == 8  # DType.uint16 of megatron.core
    assert read_header(tmp_path / "ours").type_code == 6  # dtypes[6] of DeepSpeed
    assert documents_of(tmp_path / "theirs") == documents_of(tmp_path / "ours")
    assert (tmp_path / "theirs.bin").read_bytes() == (tmp_path / "ours.bin").read_bytes()
    assert main(["verify", "--out", str(tmp_path / "theirs"), "--tokenizer", str(tokenizer)]) == 0


def test_type_codes_without_effect_are_refused(source, tmp_path, capsys):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(65_537)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    arguments = pack_arguments(source, tmp_path, tmp_path / "c", "--type-codes", "megatron")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "--type-codes=megatron has no effect: the vocabulary 65537 needs int32" in said


# datatrove


@pytest.fixture(scope="module")
def datatrove(texts, source, tmp_path_factory):
    """Texts packed by datatrove's two tasks, the ids that they should have, the tokenizer."""
    folder = tmp_path_factory.mktemp("datatrove")
    file, expected = source / "0.jsonl", []
    size = ("--vocab", "512", "--model-type", "bytes", "--out", str(folder / "tokenizer"))
    assert main(["tokenizer", "--input", str(file), *size]) == 0
    (folder / "texts").mkdir()
    loaded = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    for number, part in enumerate((texts[:250], texts[250:])):
        table = pyarrow.table({"text": part})
        pyarrow.parquet.write_table(table, folder / "texts" / f"{number}.parquet")
        expected.append([plain_ids(loaded, text) for text in part])
    for name, eos in (("with_eos", loaded.eos_token), ("without", "")):
        definition = folder / "tokenizer" / "tokenizer.json"
        python(DATATROVE, folder / "texts", definition, eos, folder / name)
    pack(file, folder / "tokenizer", folder / "valid", "--no-bos")
    return folder, expected, loaded


@needs_datatrove
@pytest.mark.slow
def test_datatroves_documents_are_read_as_it_wrote_them(datatrove, capsys):
    folder, expected, loaded = datatrove
    for number in range(2):
        ended = documents_of(folder / f"with_eos/0000{number}_tokens")
        assert ended == [[*ids, loaded.eos_token_id] for ids in expected[number]]
        framed = documents_of(folder / f"without/0000{number}_tokens")
        assert framed == [[loaded.bos_token_id, *ids] for ids in expected[number]]
        verify = ["verify", "--out", str(folder / f"with_eos/0000{number}_tokens")]
        assert main([*verify, "--tokenizer", str(folder / "tokenizer")]) == 0
        said = capsys.readouterr().out
        assert "0 % of the documents start with BOS (0); 100 % of the documents end with" in said


@needs_datatrove
@pytest.mark.slow
@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_a_run_on_datatroves_output_is_exported(documents, datatrove, tmp_path, capsys):
    folder, expected, loaded = datatrove
    tokens = [sum(len(ids) + 1 for ids in part) for part in expected]
    train = [
        {"corpus": str(folder / f"with_eos/0000{number}_tokens"), "weight": count}
        for number, count in enumerate(tokens)
    ]
    data = {
        "train": train,
        "valid": {"ours": str(folder / "valid"), "theirs": train[0]["corpus"]},
        "tokenizer": str(folder / "tokenizer"),
        "sequence": 64,
        "documents": documents,
        "shuffle": "documents",
    }
    tree = {**TINY_RUN, "run_dir": str(tmp_path / "run"), "data": data}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    train_all(tmp_path / "processes", 4, [{"run": tmp_path / "run.yaml", "overrides": []}])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    cli.main(["export", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "00000_tokens" in said and "gives the packed ids of 32 of 32 documents" in said
    assert "AutoTokenizer puts <|begin_of_text|> (id 0) before a text" in said
    exported = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    text = "def f(x):\n    return 2 * x"
    assert plain_ids(exported, text) == plain_ids(loaded, text)
    config = json.loads((tmp_path / "run/export/config.json").read_text())
    assert config["eos_token_id"] == loaded.eos_token_id


# Megatron-LM


@needs_megatron
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_what_megatron_writes_is_read_here(dtype, tmp_path):
    draws = np.random.default_rng(1)
    documents = [
        [draws.integers(0, 60_000, n).tolist() for n in draws.integers(1, 50, count)]
        for count in draws.integers(1, 4, 200)
    ]
    (tmp_path / "in.json").write_text(json.dumps(documents))
    python(MEGATRON_WRITES, tmp_path / "m", dtype, tmp_path / "in.json")
    assert documents_of(tmp_path / "m") == [sum(d, []) for d in documents]
    assert read_header(tmp_path / "m").dtype.name == dtype


@needs_megatron
@pytest.mark.slow
def test_megatron_reads_what_was_packed_for_it(source, datatrove, tmp_path):
    folder, *_ = datatrove
    pack(source, folder / "tokenizer", tmp_path / "c", "--type-codes", "megatron")
    dtype, boundaries, found = json.loads(python(MEGATRON_READS, tmp_path / "c"))
    assert "uint16" in dtype and boundaries == list(range(len(found) + 1))
    assert found == documents_of(tmp_path / "c") and len(found) == 400


@needs_datatrove
@needs_megatron
@pytest.mark.slow
def test_files_of_datatroves_tasks_are_one_corpus_when_megatron_joins_them(datatrove, tmp_path):
    folder, *_ = datatrove
    parts = [folder / f"with_eos/0000{number}_tokens" for number in range(2)]
    python(MEGATRON_JOINS, tmp_path / "all", *parts)
    assert documents_of(tmp_path / "all") == sum(map(documents_of, parts), [])
