"""Reading packed corpora: the token stream, the sample order and batches."""

import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from batches import batches_of, windows_of
from cases.corpora import write_corpus
from est_ds.data.indexed import Corpus
from est_ds.data.loader import IGNORED, Portion
from est_ds.data.order import positions
from est_ds.errors import LocalFailure, UserError

ROOT = Path(__file__).resolve().parents[1]
TYPE_CODE_AT = 17  # after magic (9 bytes) and version (8)


def write_manifest(prefix, **changes):
    header = Corpus.open(prefix).shards[0].header
    digest = {e: sha256(Path(f"{prefix}.{e}").read_bytes()).hexdigest() for e in ("bin", "idx")}
    content = {
        "format_version": 1,
        "num_tokens": header.num_tokens,
        "num_documents": header.num_boundaries - 1,
        "dtype": header.dtype.name,
        "vocabulary": 700,
        "bos_id": 1,
        "eos_id": 2,
        "text_bytes": 1,
        "unigram_entropy": 1.5,
        "tokenizer_sha256": sha256(b"a tokenizer").hexdigest(),
        "bin_bytes": header.bin_bytes,
        "idx_bytes": header.idx_bytes,
        "bin_sha256": digest["bin"],
        "idx_sha256": digest["idx"],
    }
    Path(f"{prefix}.manifest.json").write_text(json.dumps(content | changes))


@pytest.fixture(scope="session")
def stream():
    return np.random.default_rng(0).integers(0, 700, 1009)


@pytest.fixture(scope="session")
def documents(stream):
    return np.split(stream, [1, 5, 130, 130, 700, 1008])


@pytest.fixture
def prefix(tmp_path, documents):
    (tmp_path / "a folder").mkdir()
    return write_corpus(tmp_path / "a folder" / "c.train", documents)


# indexed


def test_windows_read_the_stream_across_documents(prefix, stream):
    corpus = Corpus.open(prefix)
    assert (corpus.num_tokens, corpus.num_documents) == (1009, 7)
    for start, length in [(0, 1009), (0, 1), (4, 200), (699, 310), (1008, 1), (5, 0)]:
        window = corpus.window(start, length)
        assert window.dtype == np.int64
        assert window.tolist() == stream[start : start + length].tolist()
    for start, length in [(-1, 2), (1009, 1), (1000, 10)]:
        with pytest.raises(IndexError):
            corpus.window(start, length)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint64])
def test_every_token_type_reads_the_same(tmp_path, documents, stream, dtype):
    corpus = Corpus.open(write_corpus(tmp_path / "c", documents, dtype))
    assert corpus.shards[0].header.dtype == dtype
    assert corpus.window(3, 900).tolist() == stream[3:903].tolist()


def test_megatrons_type_code_for_uint16_is_understood(prefix, stream):
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(TYPE_CODE_AT)
        assert file.read(1) == b"\x06"
        file.seek(TYPE_CODE_AT)
        file.write(b"\x08")  # uint64 to DeepSpeed
    corpus = Corpus.open(prefix)
    assert corpus.num_tokens == 1009
    assert corpus.window(0, 1009).tolist() == stream.tolist()


@pytest.mark.parametrize(
    "code",
    [
        "from est_ds.data.indexed import Corpus; Corpus.open(sys.argv[1]).window(0, 9)",
        "import est_ds, deepspeed",  # as transformers does in `eval`
    ],
)
def test_nothing_is_printed_where_deepspeed_has_to_be_imported_first(code, prefix):
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}", prefix],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_a_window_outlives_its_corpus(prefix, stream):
    assert Corpus.open(prefix).window(0, 1009).tolist() == stream.tolist()


def test_missing_files_are_refused_with_the_way_out(prefix):
    for wrong in (f"{prefix}.bin", f"{prefix}.nothing"):
        with pytest.raises(UserError, match="without the ending, or make them with `python"):
            Corpus.open(wrong)
    os.unlink(f"{prefix}.bin")
    with pytest.raises(UserError, match=r"c\.train\.bin does not exist"):
        Corpus.open(prefix)


@pytest.mark.parametrize("num_bytes", [1, 2, 500, 2018])
def test_a_truncated_bin_is_refused(prefix, num_bytes):
    os.truncate(f"{prefix}.bin", 2018 - num_bytes)
    with pytest.raises(UserError, match=r"bytes instead of the 2018 .* truncated"):
        Corpus.open(prefix)


@pytest.mark.parametrize("num_bytes", [0, 8, 33, 100, -8])
def test_a_cut_or_foreign_index_is_refused(prefix, num_bytes):
    size = os.path.getsize(f"{prefix}.idx")
    os.truncate(f"{prefix}.idx", size + num_bytes if num_bytes < 0 else num_bytes)
    with pytest.raises(UserError, match="cut off|header announces"):
        Corpus.open(prefix)
    Path(f"{prefix}.idx").write_text("something else entirely, and long enough for a header")
    with pytest.raises(UserError, match="not an index"):
        Corpus.open(prefix)


def test_an_index_of_another_corpus_is_refused(prefix, tmp_path, documents):
    other = write_corpus(tmp_path / "other", documents[:-2])
    shutil.copy(f"{other}.idx", f"{prefix}.idx")
    with pytest.raises(UserError, match="truncated, or from another corpus"):
        Corpus.open(prefix)


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no document"):
        Corpus.open(write_corpus(tmp_path / "empty", []))


def test_a_manifest_that_does_not_match_is_refused(prefix):
    write_manifest(prefix)
    path = Path(f"{prefix}.manifest.json")
    for field in ("num_tokens", "num_documents", "bin_bytes", "idx_bytes"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {field: content[field] + 1}))
        with pytest.raises(UserError, match=f"{field}=.*beside it have"):
            Corpus.open(prefix)
        path.write_text(json.dumps(content))
    path.write_text("{")
    with pytest.raises(UserError, match="manifest.json: the file: Invalid JSON"):
        Corpus.open(prefix)


def test_manifest_facts_reach_the_corpus(prefix, tmp_path):
    foreign = Corpus.open(prefix)
    assert (foreign.vocabulary, foreign.tokenizer_sha256, foreign.unigram_entropy) == (None,) * 3
    write_manifest(prefix)
    corpus = Corpus.open(prefix)
    assert (corpus.vocabulary, corpus.unigram_entropy) == (700, 1.5)
    (tmp_path / "tokenizer.model").write_bytes(b"a tokenizer")
    corpus.check_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(UserError, match="was made with"):
        corpus.check_tokenizer(tmp_path)
    foreign.check_tokenizer(tmp_path)
    with pytest.raises(UserError, match="tokenizer.model does not exist"):
        foreign.check_tokenizer(tmp_path / "nowhere")


def test_a_model_with_too_small_a_vocabulary_is_refused(prefix, stream):
    foreign = Corpus.open(prefix)
    foreign.check_vocabulary(int(stream.max()) + 1)
    with pytest.raises(UserError, match=f"holds the token {stream.max()}, but model vocab_size"):
        foreign.check_vocabulary(int(stream.max()))
    write_manifest(prefix)
    Corpus.open(prefix).check_vocabulary(700)
    with pytest.raises(UserError, match="vocab_size=699 is smaller than the vocabulary 700"):
        Corpus.open(prefix).check_vocabulary(699)


@pytest.fixture
def odd_token(tmp_path):
    """A corpus made elsewhere with one large token where no probe looks; its prefix."""
    tokens = np.ones(3_000_000, np.uint16)
    tokens[2_020_001] = 9_999
    return write_corpus(tmp_path / "odd", np.split(tokens, [1_000_000]))


def test_a_token_above_the_vocabulary_is_found_wherever_it_is_and_remembered(odd_token):
    says = "odd: it holds the token 9999, but model vocab_size=9999 is smaller; use at least 10000"
    with pytest.raises(UserError, match=says):
        Corpus.open(odd_token).check_vocabulary(9_999)
    Corpus.open(odd_token).check_vocabulary(10_000)
    remembered = Path(f"{odd_token}.range.json")
    content = json.loads(remembered.read_text())
    assert (content["smallest"], content["largest"]) == (1, 9_999)
    remembered.write_text(json.dumps(content | {"largest": 7}))
    Corpus.open(odd_token).check_vocabulary(8)  # is believed, and the tokens not read
    os.utime(f"{odd_token}.bin")
    with pytest.raises(UserError, match="the token 9999"):
        Corpus.open(odd_token).check_vocabulary(8)


def test_a_token_above_the_vocabulary_that_nobody_looked_for_is_named_when_it_is_read(
    odd_token, monkeypatch
):
    monkeypatch.setattr("est_ds.data.token_range._FORGOTTEN_BYTES", 0)
    monkeypatch.setattr("est_ds.data.token_range.os.access", lambda *_: False)
    corpus = Corpus.open(odd_token)
    with pytest.raises(UserError, match="the token 1, but model vocab_size=1"):
        corpus.check_vocabulary(1)  # what probes see
    corpus.check_vocabulary(9_999)
    assert corpus.window(0, 1_000_000).max() == 1
    with pytest.raises(LocalFailure, match="odd: it holds the token 9999, but"):
        corpus.window(2_020_000, 10)


@pytest.mark.parametrize(
    ("boundaries", "says"),
    [([0, 2, 1, 3], "document 2"), ([0, 9, 2, 3], "document 2"), ([0, -1, 2, 3], "document 1")],
)
def test_documents_that_go_backwards_are_refused_where_they_are_relied_on(
    tmp_path, boundaries, says
):
    prefix = write_corpus(tmp_path / "c", [[1, 2], [3], [4, 5]])
    Corpus.open(prefix).check_boundaries()
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(-8 * len(boundaries), os.SEEK_END)
        file.write(np.array(boundaries, "<i8").tobytes())
    corpus = Corpus.open(prefix)
    assert corpus.window(0, 5).tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match=f"c.idx: .* without a gap .* {says}\\)"):
        corpus.check_boundaries()


def test_fingerprint_follows_the_contents_not_the_path(prefix, tmp_path, documents):
    prints = {"foreign": Corpus.open(prefix).fingerprint}
    for ending in ("bin", "idx"):
        shutil.copy(f"{prefix}.{ending}", f"{tmp_path}/moved.{ending}")
    assert Corpus.open(tmp_path / "moved").fingerprint == prints["foreign"]
    prints["shorter"] = Corpus.open(write_corpus(tmp_path / "s", documents[:-1])).fingerprint
    write_manifest(prefix)
    prints["manifest"] = Corpus.open(prefix).fingerprint
    write_manifest(prefix, bin_sha256="0" * 64)
    prints["other content"] = Corpus.open(prefix).fingerprint
    assert len(set(prints.values())) == 4
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in prints.values())


# order


def test_order_is_fixed_for_ever():
    golden = {
        (0, 10, 10, 0): [6, 8, 1, 3, 2, 0, 4, 9, 5, 7],
        (5, 8, 7, 1234): [0, 5, 5, 6, 4, 3, 0, 2],
        (10**12, 4, 10**9 + 7, 2**64 - 1): [194156514, 15227451, 256044485, 613072060],
    }
    for arguments, expected in golden.items():
        assert positions(*arguments).tolist() == expected


@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 100, 255, 256, 257, 4097])
def test_every_epoch_visits_every_sample_once(num_samples):
    for epoch in (0, 1, 5):
        ids = positions(epoch * num_samples, num_samples, num_samples, seed=3)
        assert ids.dtype == np.int64 and sorted(ids) == list(range(num_samples))


def test_epochs_and_seeds_have_different_orders():
    orders = [positions(e * 997, 997, 997, s) for s in (0, 1, 2**63) for e in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 12  # 1 expected


def test_any_span_equals_the_same_span_of_a_longer_one():
    whole = positions(0, 500, 101, seed=9)
    for first, count in [(0, 0), (0, 1), (100, 2), (99, 303), (404, 96)]:
        expected = whole[first : first + count].tolist()
        assert positions(first, count, 101, seed=9).tolist() == expected


def test_seeking_far_costs_the_same_and_needs_no_memory():
    ids = positions(10**15, 64, 10**11, seed=1)
    assert len(set(ids.tolist())) == 64 and ids.min() >= 0 and ids.max() < 10**11


def test_order_looks_random():
    num_samples, num_buckets = 64 * 1021, 64
    ids = positions(0, num_samples, num_samples, seed=11)
    # Where a bucket of positions goes: 64 x 64 counts around 1021 / 64 x 1, chi-square.
    counts = np.zeros((num_buckets, num_buckets))
    np.add.at(counts, (np.arange(num_samples) // 1021, ids // 1021), 1)
    expected = 1021 / num_buckets
    freedom = (num_buckets - 1) ** 2
    deviations = (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)
    assert abs(deviations) < 4
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 4 / np.sqrt(num_samples)
    # The sample at a given position over many epochs of few samples.
    firsts = [int(positions(epoch * 10, 1, 10, seed=0)[0]) for epoch in range(2000)]
    chi_square = ((np.bincount(firsts, minlength=10) - 200) ** 2 / 200).sum()
    assert chi_square < 27.9  # 0.1 % of 9 degrees of freedom
    pairs = {tuple(positions(epoch * 3, 3, 3, seed=0).tolist()) for epoch in range(200)}
    assert len(pairs) == 6


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match="seed=-1"):
        positions(0, 1, 1, seed=-1)


def test_order_and_indexed_import_without_torch_or_deepspeed():
    code = (
        "import sys, est_ds.data.order, est_ds.data.indexed\n"
        "assert not {'torch', 'deepspeed'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# loader


@pytest.fixture
def batches(prefix):
    return batches_of([Corpus.open(prefix)], sequence=16, global_batch=12, seed=5)


def test_samples_are_windows_of_the_stream_with_labels_shifted_by_one(batches, stream):
    assert batches.corpora[0].num_samples == 63  # (1009 - 1) // 16
    [(input_ids, labels)] = batches.micro_batches(2, Portion(0, 1, micro=12))
    assert input_ids.shape == labels.shape == (12, 16)
    assert input_ids.dtype == labels.dtype == torch.int64
    for row, sample in enumerate(batches.samples(2)[2]):
        start = sample * 16
        assert input_ids[row].tolist() == stream[start : start + 16].tolist()
        assert labels[row].tolist() == stream[start + 1 : start + 17].tolist()


def test_steps_follow_the_order_across_epochs(batches):
    ids = np.concatenate([batches.samples(step)[2] for step in range(21)])
    assert ids.tolist() == positions(0, 252, 63, seed=5).tolist()
    assert all(np.bincount(ids) == 4)


def test_every_layout_reads_exactly_the_samples_of_the_step(batches):
    def rows(world, micro):
        found = []
        for rank in range(world):
            parts = list(batches.micro_batches(7, Portion(rank, world, micro=micro)))
            assert len(parts) == 12 // (world * micro)
            assert all(ids.shape == (micro, 16) for ids, _ in parts)
            found += [row for part in parts for row in torch.cat(part, 1).tolist()]
        return found

    layouts = [(w, m) for w in range(1, 13) for m in range(1, 13) if 12 % (w * m) == 0]
    assert len(layouts) == 18
    for world, micro in layouts:
        assert rows(world, micro) == rows(1, 12)


def test_digest_names_the_data_of_a_step(batches, prefix, tmp_path, documents):
    def digest(path=prefix, sequence=16, global_batch=12, seed=5, step=3):
        corpus = Corpus.open(path)
        size = {"sequence": sequence, "global_batch": global_batch, "seed": seed}
        return batches_of([corpus], **size).digest(step)

    other = write_corpus(tmp_path / "other", documents[::-1])
    digests = [digest(), digest(other), digest(sequence=15), digest(global_batch=6)]
    digests += [digest(seed=6), digest(step=4)]
    assert len(set(digests)) == 6 and {len(d) for d in digests} == {16}
    assert batches.digest(3) == digest()


def test_impossible_batches_are_refused(prefix, batches):
    corpus = Corpus.open(prefix)
    with pytest.raises(UserError, match="1009 tokens hold no window of data.sequence"):
        batches_of([corpus], sequence=1009, global_batch=1, seed=0)
    one = batches_of([corpus], sequence=1008, global_batch=1, seed=0)
    assert one.corpora[0].num_samples == 1
    with pytest.raises(UserError, match=r"batch\.global=64 is not allowed: .* has 63 windows"):
        batches_of([corpus], sequence=16, global_batch=64, seed=0)
    with pytest.raises(UserError, match=r"micro=5 x data_parallel=2 .* use batch\.global=20"):
        batches.micro_batches(0, Portion(0, 2, micro=5))


@pytest.mark.parametrize("choice", ["even", "first"])
def test_held_out_windows_are_the_chosen_ones_whatever_the_layout(prefix, stream, choice):
    windows = windows_of(Corpus.open(prefix), sequence=16, choice=choice)
    for count in (1, 5, 12, 63):
        for world, micro in [(1, 1), (1, 4), (2, 3), (3, 4), (4, 16)]:
            ranks = [
                list(windows.held_out(count, Portion(rank, world, micro=micro)))
                for rank in range(world)
            ]
            assert len({len(rank) for rank in ranks}) == 1
            rows = {}
            for input_ids, labels in (part for rank in ranks for part in rank):
                assert input_ids.shape == labels.shape == (micro, 16)
                for ids, targets in zip(input_ids, labels, strict=True):
                    if targets[0] == IGNORED:
                        assert (targets == IGNORED).all() and (ids == 0).all()
                    else:
                        rows[tuple(ids.tolist())] = targets.tolist()
            part = Fraction(63, count) if choice == "even" else 1
            middles = [int(part * i + (part / 2 if choice == "even" else 0)) for i in range(count)]
            expected = {
                tuple(stream[at : at + 16].tolist()): stream[at + 1 : at + 17].tolist()
                for at in (16 * sample for sample in middles)
            }
            assert len(expected) == count and rows == expected


def test_more_held_out_windows_than_there_are_is_refused(batches):
    for count in (0, 64):
        with pytest.raises(UserError, match=rf"evaluate\.sequences={count} .* 63 windows"):
            batches.corpora[0].held_out(count, Portion(0, 1, micro=1))
