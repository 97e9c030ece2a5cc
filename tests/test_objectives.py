"""Objectives against examples worked out by hand, and as pure functions of (seed, sample)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batches import batches_of, windows_of
from est_ds.data.indexed import Corpus
from est_ds.data.loader import Portion
from est_ds.data.objectives.base import HELD_OUT, TRAINING, Draws
from est_ds.data.objectives.causal import Causal
from est_ds.data.objectives.loss import IGNORED, token_loss
from est_ds.data.objectives.mlm import Masking, Mlm, mask_tokens
from est_ds.data.objectives.spans import Sizes, corrupt, fitted, sizes_of, split
from est_ds.data.objectives.ul2 import PRESETS, Denoiser, Ul2

U32 = np.uint32
PREFIX_ONLY = (Denoiser(kind="prefix", rate=0.25, mode="S"),)
SPAN_ONLY = (Denoiser(kind="span", rate=0.25, mean=2, mode="R"),)
CAUSAL_ONLY = (Denoiser(kind="causal"),)


def draws(sample=0, seed=0, stream=TRAINING):
    return Draws(seed, stream, sample)


# masked language model


def test_masking_by_hand():
    tokens = np.array([1, 50, 60, 70, 80, 90, 2, 40])
    masking = Masking(4, mask=0.5, random=0.25, mask_id=100, vocabulary=10, special_ids=(1, 2))
    # The specials have the smallest keys and are passed over; of the others 40, 90, 60 and 80 have
    # the smallest.
    positions = np.array([0, 90, 30, 80, 40, 20, 1, 10], U32)
    unit = 2**32
    # 60 stays (fate .8), 80 is masked (.2), 90 is replaced (.6), 40 is masked (.49).
    fates = (np.array([0, 0, 0.8, 0, 0.2, 0.6, 0, 0.49]) * unit).astype(U32)
    replacements = (np.array([0, 0, 0, 0, 0, 0.37, 0, 0]) * unit).astype(U32)
    inputs, labels = mask_tokens(tokens, masking, positions, fates, replacements)
    assert inputs.tolist() == [1, 50, 60, 70, 100, 3, 2, 100]
    no = IGNORED
    assert labels.tolist() == [no, no, 60, no, 80, 90, no, 40]
    assert tokens.tolist() == [1, 50, 60, 70, 80, 90, 2, 40]


def test_window_of_almost_only_special_tokens_has_what_targets_there_are():
    masking = Masking(3, mask=1.0, random=0.0, mask_id=9, vocabulary=9, special_ids=(0,))
    keys = np.arange(5, dtype=U32)
    inputs, labels = mask_tokens(np.array([0, 0, 4, 0, 0]), masking, keys, keys, keys)
    assert inputs.tolist() == [0, 0, 9, 0, 0]
    assert labels.tolist() == [IGNORED, IGNORED, 4, IGNORED, IGNORED]


def test_mlm_has_berts_rates_and_every_position_the_same_chance():
    length, count = 40, 2000
    masking = Masking(6, mask=0.8, random=0.1, mask_id=1000, vocabulary=1000, special_ids=())
    mlm = Mlm(length, masking)
    tokens = np.arange(length) + 500
    chosen, fates = np.zeros(length), np.zeros(3)
    for sample in range(count):
        example = mlm.example(tokens, draws(sample))
        [inputs], labels = example.inputs, example.labels
        at = labels != IGNORED
        assert at.sum() == 6 == mlm.num_targets(draws(sample))
        assert (inputs[~at] == tokens[~at]).all() and (labels[at] == tokens[at]).all()
        chosen += at
        masked, same = inputs[at] == 1000, inputs[at] == tokens[at]
        fates += [masked.sum(), (~masked & ~same).sum(), same.sum()]
    expected = count * 6 / length
    assert (np.abs(chosen - expected) < 5 * np.sqrt(expected)).all()
    assert np.abs(fates / fates.sum() - [0.8, 0.1, 0.1]).max() < 0.015


# spans


def test_spans_of_the_t5_papers_example():
    """arXiv 1910.10683, figure 2: Thank you for inviting me to your party last week."""
    words = "Thank you for inviting me to your party last week".split()
    tokens = np.arange(len(words))
    inputs, targets = corrupt(tokens, [2, 4], [2, 1], first_sentinel=100)
    names = dict(enumerate(words)) | {100: "<X>", 101: "<Y>", 102: "<Z>"}
    # The paper's text ends with a kept word; spans here end with noise, so "week" stands behind.
    assert [names[i] for i in inputs] == "Thank you <X> me to your party <Y>".split()
    assert [names[i] for i in targets] == "<X> for inviting <Y> last <Z>".split()


def test_split_by_hand():
    # Five items, three parts: cuts at the places with the two smallest keys, after items 2 and 4.
    assert split(5, 3, np.array([9, 1, 5, 2], U32)).tolist() == [2, 2, 1]
    assert split(5, 1, np.array([9, 1, 5, 2], U32)).tolist() == [5]
    assert split(3, 3, np.array([7, 7], U32)).tolist() == [1, 1, 1]
    assert split(1, 1, np.array([], U32)).tolist() == [1]


def test_splits_are_uniform():
    counts: dict[tuple, int] = {}
    for sample in range(3000):
        parts = tuple(split(5, 3, draws(sample).keys(1, 4)))
        counts[parts] = counts.get(parts, 0) + 1
    assert len(counts) == 6 and all(abs(n - 500) < 5 * np.sqrt(500) for n in counts.values())


def test_sizes_by_hand():
    assert sizes_of(100, 0.15, 3) == Sizes(100, 15, 5)
    assert (sizes_of(100, 0.15, 3).inputs, sizes_of(100, 0.15, 3).targets) == (90, 21)
    assert sizes_of(100, 0.25, None) == Sizes(100, 25, 0)
    assert (sizes_of(100, 0.25, None).inputs, sizes_of(100, 0.25, None).targets) == (75, 25)
    # 101 of text and 2 x 5 + 1 sentinels fill 112; for 113 a kept token is added.
    assert fitted(112, lambda s: s.inputs + s.targets, 0.15, 3) == Sizes(101, 15, 5)
    for room in range(20, 300):
        for rate, mean in [(0.15, 3), (0.5, 3), (0.5, 64), (0.15, 8), (0.25, None)]:
            sizes = fitted(room, lambda s: s.inputs + s.targets, rate, mean)
            assert sizes.inputs + sizes.targets == room
            assert abs(sizes.noise - rate * sizes.tokens) <= 1.5
            sizes = fitted(room, lambda s: s.inputs, rate, mean)
            assert sizes.inputs == room and abs(sizes.noise - rate * sizes.tokens) <= 1.5


# UL2


def test_prefix_in_one_stream_by_hand():
    # 8 inputs: the mode and 8 tokens, of which the last 2 (a quarter) are targets.
    ul2 = Ul2(PREFIX_ONLY, sequence=8, first_id=100)
    example = ul2.example(np.arange(9) + 10, draws())
    assert example.inputs[0].tolist() == [101, 10, 11, 12, 13, 14, 15, 16]
    assert example.labels.tolist() == [IGNORED] * 6 + [16, 17]
    assert ul2.num_targets(draws()) == 2


def test_causal_in_one_stream_is_next_token_prediction():
    tokens = np.arange(9) + 10
    ul2, causal = Ul2(CAUSAL_ONLY, sequence=8, first_id=100), Causal(8)
    one, other = ul2.example(tokens, draws()), causal.example(tokens, draws())
    assert one.inputs[0].tolist() == other.inputs[0].tolist()
    assert one.labels.tolist() == other.labels.tolist()
    assert ul2.num_targets(draws()) == 8
    with_mode = Ul2((Denoiser(kind="causal", mode="S"),), sequence=8, first_id=100)
    example = with_mode.example(tokens, draws())
    assert example.inputs[0].tolist() == [101, 10, 11, 12, 13, 14, 15, 16]
    assert example.labels.tolist() == [10, 11, 12, 13, 14, 15, 16, 17]


def test_spans_in_one_stream_by_hand():
    # 18 places: the mode, 12 tokens of which 3 (a quarter) are noise in round(3 / 2) = 2 spans, a
    # sentinel for each on both sides and one that closes the targets: 1 + (9 + 2) + (3 + 2 + 1).
    ul2 = Ul2(SPAN_ONLY, sequence=17, first_id=100)
    assert ul2.sizes == (Sizes(12, 3, 2),)
    # In 16 places these 12 tokens have no room, nor 11; 10 with 2 of noise in 1 span leave a gap of
    # 2, which kept tokens fill.
    assert Ul2(SPAN_ONLY, sequence=15, first_id=100).sizes == (Sizes(12, 2, 1),)
    example = ul2.example(np.arange(18) + 10, draws(3))
    stream = [*example.inputs[0].tolist(), int(example.labels[-1])]
    assert len(stream) == 18 and stream[0] == 100
    sizes = ul2.sizes[0]
    inputs, targets = stream[1 : 1 + sizes.inputs], stream[1 + sizes.inputs :]
    assert rebuilt(inputs, targets, 103) == list(range(10, 10 + sizes.tokens))
    assert example.labels[: sizes.inputs].tolist() == [IGNORED] * sizes.inputs
    assert example.labels[sizes.inputs :].tolist() == targets
    assert ul2.num_targets(draws(3)) == len(targets) == sizes.targets


def rebuilt(inputs, targets, first_sentinel):
    """The text from its corrupted form."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token >= first_sentinel:
            spans[last := token] = []
        else:
            spans[last].append(token)
    assert not spans.pop(last)  # the closing sentinel
    assert list(spans) == list(range(first_sentinel, first_sentinel + len(spans)))
    assert all(spans.values())
    return [t for token in inputs for t in spans.get(token, [token])]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fill_one_stream_exactly_and_lose_nothing_of_the_text(preset):
    ul2 = Ul2(PRESETS[preset], sequence=512, first_id=1000)
    seen = set()
    for sample in range(60):
        index = ul2._index(draws(sample))
        seen.add(index)
        sizes, denoiser = ul2.sizes[index], PRESETS[preset][index]
        example = ul2.example(np.arange(513), draws(sample))
        stream = [*example.inputs[0].tolist(), int(example.labels[-1])]
        assert len(stream) == 513
        assert (example.labels != IGNORED).sum() == ul2.num_targets(draws(sample))
        if denoiser.mode:
            assert stream.pop(0) == 1000 + "RSX".index(denoiser.mode)
        if denoiser.kind == "span":
            text = rebuilt(stream[: sizes.inputs], stream[sizes.inputs :], 1003)
        else:
            text = stream
        assert text == list(range(sizes.tokens)) and max(stream) < 1000 + ul2.num_own_ids
    assert seen == set(range(len(PRESETS[preset])))


def test_published_spans_and_rates_of_ul2():
    """arXiv 2205.05131, table 1."""
    found = {(d.mode, d.kind, d.mean, d.rate) for d in PRESETS["ul2"]}
    spans = {
        ("R", 3, 0.15),
        ("R", 8, 0.15),
        ("X", 3, 0.5),
        ("X", 8, 0.5),
        ("X", 64, 0.15),
        ("X", 64, 0.5),
    }
    assert found == {(m, "span", *s) for m, *s in spans} | {("S", "prefix", None, 0.25)}
    ul2 = Ul2(PRESETS["ul2"], sequence=512, first_id=0)
    for denoiser, sizes in zip(ul2.denoisers, ul2.sizes):
        assert sizes.noise / sizes.tokens == pytest.approx(denoiser.rate, abs=0.005)
        if denoiser.kind == "span":
            assert sizes.noise / sizes.spans == pytest.approx(denoiser.mean, rel=0.25)


def test_mixture_of_60_20_20():
    ul2 = Ul2(PRESETS["causal_prefix_span"], sequence=64, first_id=100)
    counts = np.bincount([ul2._index(draws(sample)) for sample in range(5000)])
    assert np.abs(counts / 5000 - [0.6, 0.2, 0.2]).max() < 0.03
    assert [d.kind for d in ul2.denoisers] == ["causal", "prefix", "span"]


def test_two_streams_by_hand():
    # 7 source tokens: the mode and 6 of 8 tokens; the last 2 (a quarter) are the decoder's.
    ul2 = Ul2(PREFIX_ONLY, sequence=7, first_id=100, decoder_start=0)
    assert (ul2.window, ul2.stride, ul2.target_sequence) == (8, 8, 2)
    example = ul2.example(np.arange(8) + 10, draws())
    assert [i.tolist() for i in example.inputs] == [[101, 10, 11, 12, 13, 14, 15], [0, 16]]
    assert example.labels.tolist() == [16, 17]


def test_two_streams_have_fixed_shapes():
    ul2 = Ul2(PRESETS["ul2"], sequence=128, first_id=1000, decoder_start=0)
    assert ul2.input_lengths == (128, ul2.target_sequence)
    for sample in range(40):
        sizes = ul2.sizes[ul2._index(draws(sample))]
        example = ul2.example(np.arange(ul2.window) + 5, draws(sample))
        assert tuple(len(i) for i in example.inputs) == ul2.input_lengths
        source, decoder = example.inputs
        targets = example.labels[example.labels != IGNORED]
        assert len(targets) == sizes.targets == ul2.num_targets(draws(sample))
        assert decoder.tolist()[: len(targets)] == [0, *targets[:-1]]
        assert source[0] in (1000, 1001, 1002)
        if sizes.spans:
            assert rebuilt(source[1:].tolist(), targets.tolist(), 1003) == list(
                range(5, 5 + sizes.tokens)
            )


# addresses, batches


@pytest.fixture(scope="module")
def packed(corpus):
    return Corpus.open(corpus / "train")


def objectives():
    masking = Masking(10, 0.8, 0.1, 512, 512, (1, 2))
    return {
        "mlm": Mlm(64, masking),
        "ul2": Ul2(PRESETS["causal_prefix_span"], sequence=64, first_id=512),
        "ul2, two streams": Ul2(PRESETS["ul2"], sequence=64, first_id=512, decoder_start=0),
    }


def batches(packed, objective, **changes):
    given = {"sequence": 64, "global_batch": 8, "seed": 5, "objective": objective, **changes}
    return batches_of([packed], **given)


def rows(parts):
    """Every row of micro-batches, as one list of numbers."""
    found = []
    for inputs, (labels, _) in parts:
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        found += torch.cat([*inputs, labels], 1).tolist()
    return found


@pytest.mark.parametrize("name", objectives())
def test_samples_do_not_depend_on_the_layout(name, packed):
    b = batches(packed, objectives()[name])
    whole = rows(b.micro_batches(3, Portion(0, 1, micro=8)))
    for world, micro in [(1, 1), (2, 2), (4, 1), (8, 1)]:
        parts = [b.micro_batches(3, Portion(r, world, micro=micro)) for r in range(world)]
        assert [row for part in parts for row in rows(part)] == whole


@pytest.mark.parametrize("name", objectives())
def test_sample_is_drawn_anew_in_another_epoch_and_with_another_seed(name, packed):
    objective = objectives()[name]
    tokens = packed.window(0, objective.window)
    seen = {
        str(objective.example(tokens, d))
        for d in [draws(7), draws(7 + 1000), draws(7, seed=1), draws(7, stream=HELD_OUT)]
    }
    again = str(objective.example(tokens, draws(7)))
    assert again in seen and len(seen) >= 3  # a causal sample has no draw in it


@pytest.mark.parametrize("name", objectives())
def test_loss_is_the_mean_over_the_targets_of_the_global_batch(name, packed):
    b = batches(packed, objectives()[name])
    vocabulary = 700

    def loss(world, micro):
        losses = []
        for rank in range(world):
            for _, (labels, divisor) in b.micro_batches(2, Portion(rank, world, micro=micro)):
                # Logits that are a function of the row's labels, as a model's would be.
                logits = torch.cos(labels[..., None] * torch.arange(vocabulary) / 7.0)
                losses.append(token_loss(logits, (labels, divisor)).item())
        return sum(losses) / len(losses)

    [(_, (labels, _))] = b.micro_batches(2, Portion(0, 1, micro=8))
    logits = torch.cos(labels[..., None] * torch.arange(vocabulary) / 7.0)
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    for world, micro in [(1, 8), (1, 1), (2, 2), (4, 2), (8, 1)]:
        assert loss(world, micro) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("name", objectives())
def test_held_out_samples_and_their_mean_are_the_same_in_every_layout(name, corpus):
    windows = windows_of(Corpus.open(corpus / "valid"), sequence=64, objective=objectives()[name])
    count, means, seen = 5, [], []
    for world, micro in [(1, 5), (1, 2), (2, 2), (3, 4)]:
        parts = [
            part
            for rank in range(world)
            for part in windows.held_out(count, Portion(rank, world, micro=micro))
        ]
        sums = [(labels != IGNORED).sum().item() / divisor.item() for _, (labels, divisor) in parts]
        means.append(sum(sums) / len(sums) * len(parts) * micro / count)
        seen.append(sorted(row for row in rows(parts) if set(row) != {0, IGNORED}))
    assert means == pytest.approx([1.0] * 4)
    assert all(s == seen[0] for s in seen) and len(seen[0]) == count


def test_digest_of_causal_data_is_unchanged_and_others_name_their_objective(packed):
    plain = batches_of([packed], sequence=64, global_batch=8, seed=5)
    assert plain.digest(3) == batches(packed, Causal(64)).digest(3)
    other = Mlm(64, Masking(9, 0.8, 0.1, 512, 512, (1, 2)))
    found = [plain.digest(3), *(batches(packed, o).digest(3) for o in objectives().values())]
    found += [batches(packed, other).digest(3), batches(packed, objectives()["mlm"]).digest(4)]
    assert len(set(found)) == len(found)


def test_windows_of_masked_language_model_do_not_overlap(packed):
    mlm = objectives()["mlm"]
    b = batches(packed, mlm)
    assert b.corpora[0].num_samples == packed.num_tokens // 64
    [(inputs, (labels, divisor))] = b.micro_batches(0, Portion(0, 1, micro=8))
    assert divisor == 80.0
    for row, sample in enumerate(b.samples(0)[2]):
        window = torch.from_numpy(packed.window(int(sample) * 64, 64))
        kept = labels[row] == IGNORED
        assert (inputs[row][kept] == window[kept]).all()
        assert (labels[row][~kept] == window[~kept]).all()


GOLDEN_MLM = [
    *((4, 512), (11, 336), (16, 512), (20, 512), (27, 512)),
    *((28, 424), (33, 512), (57, 512), (61, 512), (63, 512)),
]
GOLDEN_DENOISERS = [0, 2, 2, 0, 4, 6, 2, 4]


def test_golden_draws():
    """Draws are fixed for ever: a change would break the promise of every resumed run."""
    example = objectives()["mlm"].example(np.arange(64) + 100, draws(9))
    chosen = np.flatnonzero(example.labels != IGNORED)
    found = [(int(i), int(example.inputs[0][i])) for i in chosen]
    assert found == GOLDEN_MLM
    ul2 = Ul2(PRESETS["ul2"], sequence=64, first_id=512)
    assert [ul2._index(draws(i)) for i in range(8)] == GOLDEN_DENOISERS
