"""The order of data: mixtures, shuffled documents, seeking, reading ahead."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batches import batches_of, windows_of
from cases.corpora import write_corpus
from conftest import ROOT
from est_ds.data import streams
from est_ds.data.indexed import Corpus
from est_ds.data.loader import Portion
from est_ds.data.mixture import LONGEST_PERIOD, Mixture, PhaseWeights, quota_sequence, whole_parts
from est_ds.data.prefetch import Prefetched
from est_ds.data.streams import ShuffledStream, Stream
from est_ds.errors import UserError

TINYLLAMA = (0.6936, 0.3064)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Three corpora of documents of very different lengths, some empty; every token is unique."""
    folder, found, first = tmp_path_factory.mktemp("corpora"), [], 0
    for i, num_documents in enumerate((40, 23, 7)):
        lengths = np.random.default_rng(i).choice([0, 1, 2, 5, 9, 40, 150], num_documents)
        tokens = np.arange(first, first + lengths.sum())
        documents = np.split(tokens, np.cumsum(lengths)[:-1])
        found.append(Corpus.open(write_corpus(folder / f"c{i}", documents, np.int32)))
        first += len(tokens)
    return found


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 6)


def documents_of(corpus):
    starts = corpus.document_start(np.arange(corpus.num_documents + 1))
    return [corpus.window(a, b - a).tolist() for a, b in zip(starts, starts[1:]) if b > a]


def mixed(corpora, weights=(0.5, 0.3, 0.2), **changes):
    given = {
        "sequence": 8,
        "global_batch": 12,
        "seed": 5,
        "weights": [PhaseWeights(0, weights)],
    } | changes
    return batches_of(corpora, **given)


# mixtures

# Weights with few decimals, so that the period is short; some of them 0.
weights_of = st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any)


@settings(deadline=None)
@given(weights_of)
def test_proportions_are_within_one_sample_of_exact_at_every_prefix(weights):
    sequence, period = quota_sequence(tuple(weights)), sum(weights)
    counts = np.cumsum(sequence[:, None] == np.arange(len(weights)), axis=0)
    exact = np.arange(1, period + 1)[:, None] * np.array(weights)
    assert (abs(counts * period - exact) < period).all()  # in whole numbers: no rounding
    assert counts[-1].tolist() == weights


@settings(deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 9), min_size=n, max_size=n).filter(any), min_size=1, max_size=4
        )
    ),
    st.integers(1, 9),
    st.integers(1, 30),
    st.integers(0, 300),
    st.integers(0, 50),
)
def test_seeking_finds_what_counting_from_the_start_finds(weights, batch, steps, first, count):
    shares = [PhaseWeights(i * steps, tuple(map(float, w))) for i, w in enumerate(weights)]
    mixture = Mixture(shares, batch)
    # The definition: the phases' sequences, each from its start on, and running counts.
    whole = []
    for i, share in enumerate(shares):
        sequence = quota_sequence(whole_parts(share.weights)).tolist()
        length = 400 if i + 1 == len(shares) else batch * steps
        whole += (sequence * -(-length // len(sequence)))[:length]
    seen, numbers = [0] * mixture.num_corpora, []
    for corpus in whole:
        numbers.append(seen[corpus])
        seen[corpus] += 1
    found = mixture.locate(first, count)
    assert found[0].tolist() == whole[first : first + count]
    assert found[1].tolist() == numbers[first : first + count]
    before = np.bincount(whole[:first], minlength=mixture.num_corpora)
    assert mixture.counts(first).tolist() == before.tolist()


def test_weights_change_at_the_step_that_they_say():
    mixture = Mixture(
        [PhaseWeights(0, (1.0, 0.0)), PhaseWeights(10, (0.25, 0.75)), PhaseWeights(20, (0.0, 1.0))],
        8,
    )
    assert mixture.counts(80).tolist() == [80, 0]
    assert mixture.counts(160).tolist() == [100, 60]
    corpora, _ = mixture.locate(72, 16)
    assert set(corpora[:8].tolist()) == {0} and sorted(corpora[8:].tolist()) == [0, 0, *[1] * 6]
    assert mixture.counts(10**15).tolist() == [100, 10**15 - 100]


def test_tinyllamas_proportions_are_exact_far_into_the_run():
    mixture = Mixture([PhaseWeights(0, TINYLLAMA)], 1024)
    for samples in (1250, 10**13, 7 * 10**12 + 3):
        exact = [Fraction("0.6936") * samples, Fraction("0.3064") * samples]
        assert all(abs(n - e) < 1 for n, e in zip(mixture.counts(samples).tolist(), exact))


def test_mixture_is_fixed_for_ever():
    assert whole_parts(TINYLLAMA) == (867, 383)
    assert quota_sequence((5, 3, 2)).tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
    corpora, numbers = Mixture([PhaseWeights(0, TINYLLAMA)], 512).locate(10**12, 8)
    assert corpora.tolist() == GOLDEN_CORPORA and numbers.tolist() == GOLDEN_NUMBERS


GOLDEN_CORPORA = [0, 0, 1, 0, 0, 1, 0, 0]
GOLDEN_NUMBERS = [
    *(693600000000, 693600000001, 306400000000, 693600000002),
    *(693600000003, 306400000001, 693600000004, 693600000005),
]


def test_weights_without_exact_proportions_are_refused():
    assert sum(whole_parts((0.333333, 0.666667))) == LONGEST_PERIOD
    for weights in [(1 / 3, 1 / 7), (1.0, 1e-9), (627123457.0, 250654321.0)]:
        with pytest.raises(UserError, match="at most six decimals"):
            whole_parts(weights)


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**63))
def test_every_corpus_of_a_mixture_is_read_once_an_epoch(corpora, a, b, c, seed):
    batches = mixed(corpora, (float(a), float(b), float(c)), sequence=16, global_batch=3, seed=seed)
    found = [batches.samples(step) for step in range(100)]
    which, epochs, ids = (np.concatenate(part) for part in zip(*found))
    for i, windows in enumerate(batches.corpora):
        own_epochs, own_ids = epochs[which == i], ids[which == i]
        assert (np.diff(own_epochs) >= 0).all()
        for epoch in range(own_epochs[-1]):  # the last one may not be over
            samples = own_ids[own_epochs == epoch]
            assert sorted(samples) == list(range(windows.num_samples))
        last = own_ids[own_epochs == own_epochs[-1]]
        assert len(set(last)) == len(last)


def test_corpora_of_a_mixture_have_orders_of_their_own(corpora):
    batches = batches_of(
        [corpora[0]] * 2, sequence=2, global_batch=50, seed=3, weights=[PhaseWeights(0, (1.0, 1.0))]
    )
    which, _, ids = batches.samples(0)
    first, second = ids[which == 0], ids[which == 1]
    assert (first == second).sum() < 5
    alone = batches_of([corpora[0]], sequence=2, global_batch=25, seed=3)
    assert first.tolist() == alone.samples(0)[2].tolist()


def test_a_batch_that_would_repeat_a_small_corpus_is_refused(corpora):
    small = corpora[2].num_tokens // 8 - 1
    with pytest.raises(UserError, match=rf"{corpora[2].prefix} has \d+ windows"):
        mixed(corpora, (0.1, 0.1, 0.8), global_batch=4 * small)


# documents


@pytest.mark.parametrize("sequence", [1, 7, 64])
def test_shuffled_documents_are_all_there_once_in_every_epoch(corpora, sequence, small_blocks):
    orders = set()
    for epoch in range(3):
        stream = ShuffledStream(corpora[0], seed=3)
        whole = stream.read(epoch, 0, corpora[0].num_tokens)
        starts = [0, *stream.starts(epoch, 0, corpora[0].num_tokens), corpora[0].num_tokens]
        found = [whole[a:b].tolist() for a, b in zip(starts, starts[1:])]
        assert sorted(found) == sorted(documents_of(corpora[0]))
        orders.add(str(found))
        # Windows lose nothing: one after the other they are the stream.
        windows = windows_of(corpora[0], sequence=sequence, stream=stream)
        read = [stream.read(epoch, i * sequence, sequence) for i in range(windows.num_samples)]
        assert np.concatenate(read).tolist() == whole[: windows.num_samples * sequence].tolist()
    assert len(orders) == 3


def test_documents_stay_in_their_block_and_blocks_in_their_place(corpora, small_blocks):
    corpus, stream = corpora[0], ShuffledStream(corpora[0], seed=3)
    ends = corpus.document_start(np.minimum(np.arange(0, 43, 6), corpus.num_documents))
    for first, end in zip(ends, ends[1:]):
        read = stream.read(1, int(first), int(end - first))
        assert sorted(read) == list(range(first, end))


@settings(deadline=None)
@given(st.integers(0, 2), st.booleans(), st.data())
def test_any_window_and_its_documents_equal_those_of_the_whole_stream(corpora, epoch, own, data):
    corpus = corpora[1]
    stream = Stream(corpus) if own else ShuffledStream(corpus, seed=8, corpus_index=2)
    whole = stream.read(epoch, 0, corpus.num_tokens)
    every = stream.starts(epoch, 0, corpus.num_tokens)
    first = data.draw(st.integers(0, corpus.num_tokens - 1))
    length = data.draw(st.integers(1, corpus.num_tokens - first))
    assert stream.read(epoch, first, length).tolist() == whole[first : first + length].tolist()
    within = every[(every > first) & (every < first + length)] - first
    assert stream.starts(epoch, first, length).tolist() == within.tolist()
    # From the definition: a document begins where the token before is of another one.
    assert len(every) + 1 == len(documents_of(corpus))


def test_shuffled_documents_are_fixed_for_ever(corpora):
    stream = ShuffledStream(corpora[2], seed=2**63, corpus_index=1)
    documents = documents_of(corpora[2])
    starts = [0, *stream.starts(4, 0, corpora[2].num_tokens)]
    first_tokens = [int(stream.read(4, int(start), 1)[0]) for start in starts]
    order = [[d[0] for d in documents].index(token) for token in first_tokens]
    assert order == GOLDEN_SHUFFLED


GOLDEN_SHUFFLED = [5, 3, 2, 4, 0, 1]


# batches


def rows(parts):
    found = []
    for inputs, labels in parts:
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        labels = labels[0] if isinstance(labels, tuple) else labels
        found += torch.cat([*inputs, labels], 1).tolist()
    return found


MODES = [{}, {"shuffled": True}, {"separate": True}, {"shuffled": True, "separate": True}]


@pytest.mark.parametrize("mode", MODES)
def test_every_layout_reads_the_same_mixture(mode, corpora):
    batches = mixed(corpora, **mode)
    for step in (0, 41):
        whole = rows(batches.micro_batches(step, Portion(0, 1, micro=12)))
        for world, micro in [(1, 4), (2, 3), (4, 1), (3, 4)]:
            ranks = [
                rows(batches.micro_batches(step, Portion(r, world, micro=micro)))
                for r in range(world)
            ]
            assert [row for rank in ranks for row in rank] == whole


def test_digest_names_everything_that_makes_a_batch(corpora):
    digests = [mixed(corpora, **mode).digest(7) for mode in MODES]
    digests += [
        mixed(corpora).digest(8),
        mixed(corpora, (0.4, 0.4, 0.2)).digest(7),
        mixed(corpora, seed=6).digest(7),
        mixed(corpora, seed=6, shuffled=True).digest(7),
        mixed(corpora[::-1], (0.2, 0.3, 0.5)).digest(7),
        batches_of(corpora[:1], sequence=8, global_batch=12, seed=5).digest(7),
    ]
    assert len(set(digests)) == len(digests)
    assert digests[0] == mixed(corpora).digest(7)


def test_digest_of_one_corpus_is_fixed_for_ever(tmp_path):
    stream = np.random.default_rng(0).integers(0, 700, 1009)
    prefix = write_corpus(tmp_path / "c", np.split(stream, [1, 5, 130, 130, 700, 1008]))
    batches = batches_of([Corpus.open(prefix)], sequence=16, global_batch=12, seed=5)
    assert [batches.digest(s) for s in (3, 10**7)] == ["1c4e786fc48521ad", "778a27d231af3333"]


# seeking

SEEK = """
import resource, sys, time
import torch
from est_ds.data.indexed import Corpus
from est_ds.data.loader import Batches, Ordering, Portion, Sampling
from est_ds.data.mixture import PhaseWeights

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = rss()
corpus = Corpus.open(sys.argv[1])
assert corpus.num_tokens == 10**12
by_document, several = sys.argv[2] == "documents", len(sys.argv) > 3
weights = (PhaseWeights(0, (0.6936, 0.3064) if several else (1.0,)),)
batches = Batches(
    [corpus] * (2 if several else 1),
    Sampling(sequence=2048, separate=by_document),
    Ordering(global_batch=1024, seed=0, weights=weights, shuffled=by_document),
)
for step in (0, 10_000_000, 0, 10_000_000):
    began = time.perf_counter()
    batches.samples(step)
    print(time.perf_counter() - began)
next(batches.micro_batches(10_000_000, Portion(3, 8, micro=8)))
print(rss() - before)
"""


@pytest.mark.parametrize("case", ["sequences", "documents", "sequences mixture"])
def test_seeking_in_a_trillion_tokens_costs_nothing(case, trillion):
    command = [sys.executable, "-c", SEEK, trillion, *case.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *seconds, grown_bytes = map(float, done.stdout.split())
    assert min(seconds[1::2]) < 0.010  # of step 10,000,000
    assert grown_bytes < 200e6


@pytest.fixture(scope="module")
def trillion(tmp_path_factory):
    """An index of 10**12 tokens in 10**6 documents, and a file of zeros that takes no space."""
    prefix = str(tmp_path_factory.mktemp("trillion") / "c")
    lengths = np.full(10**6, 10**6, "<i4")
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 10**6, 10**6 + 1))
        for part in (lengths, np.arange(10**6, dtype="<i8") * 2 * 10**6, np.arange(10**6 + 1)):
            file.write(part.astype(part.dtype.newbyteorder("<")).tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        try:
            os.truncate(file.fileno(), 2 * 10**12)
        except OSError:
            pytest.skip("this file system has no sparse files of 2 TB")
    yield prefix
    os.unlink(f"{prefix}.bin")


# reading ahead


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("est_ds-loader")]


def test_what_is_read_ahead_is_what_the_step_would_read(corpora):
    batches, portion = mixed(corpora, separate=True), Portion(1, 2, micro=3)
    with Prefetched(batches, 9, portion) as loader:
        for step in (0, 1, 2, 7, 8, 3):  # in order, and not
            expected = rows(batches.micro_batches(step, portion))
            assert rows(loader.micro_batches(step)) == expected
        assert len(loader_threads()) == 1
    assert not loader_threads()


def test_a_process_that_asks_for_nothing_reads_nothing(corpora):
    with Prefetched(mixed(corpora), 9, Portion(0, 1, micro=12)) as loader:
        loader.micro_batches(0)  # as a pipe stage in the middle has it
        assert not loader_threads()


def test_an_error_of_the_reading_thread_reaches_the_step_and_ends_it(corpora):
    batches = mixed(corpora)
    batches.corpora[0].corpus = None
    batches.corpora[0].stream = None
    with pytest.raises(AttributeError):
        with Prefetched(batches, 9, Portion(0, 1, micro=12)) as loader:
            next(loader.micro_batches(0))
    assert not loader_threads()
