"""Memory of a process: by hand, as an H200 had it, and as torch's allocator reports it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.common import run_config
from cases.tiny import make_config
from conftest import ROOT
from est_ds.config.run_file import load_run
from est_ds.config.sections import Optimizer
from est_ds.cost.activations import Setting, activations, loss_bytes
from est_ds.cost.flops import StepSize
from est_ds.cost.gpus import gpu_of
from est_ds.cost.memory import memory_of_phase, memory_of_pipe_stage, most_loads
from est_ds.cost.states import Process, held
from est_ds.design import make_outline
from est_ds.plans.methods.base import full_loads
from est_ds.plans.shape import Attention, Mlp, ModelShape
from est_ds.report.asked import Asked
from est_ds.report.plan_memory import (
    largest_micro,
    memory_of,
    remedies,
    subject_of,
    usable_bytes,
)
from est_ds.report.plan_text import gibibytes, plan_report
from peak_memory import CASES, compared

WITHIN = 0.10
FAST = ["llama, est, fp32, ZeRO 0", "gpt2 with dropout, fp32, ZeRO 1 of 2"]
OTHERS = [name for name in CASES if name not in FAST]


@pytest.mark.parametrize(
    ("precision", "zero", "expected"),
    [
        ("fp32", 0, (400, 0, 800)),
        ("fp32", 1, (400, 0, 200)),
        ("bf16", 1, (200, 0, 300)),
        ("bf16", 2, (200, 0, 300)),
        ("bf16", 3, (70, 100, 300)),
        ("fp32", 3, (140, 100, 300)),
    ],
)
def test_states_of_100_parameters_on_4_replicas(precision, zero, expected):
    options = {"zero_optimization": {"stage3_param_persistence_threshold": 5}} if zero == 3 else {}
    config = make_config(precision=precision, parallel={"zero": zero}, deepspeed=options)
    # Two matrices of 40 and 50, and vectors of 10, which ZeRO 3 does not cut.
    process = Process(config, 100, (40, 50), 4, 100.0, 100.0, on_gpu=True)
    found = held(process)
    assert (found.weights, found.gradients, found.optimizer) == expected
    assert found.buckets == (400 if zero == 3 else 0) and found.host == 0
    frozen = config.model_copy(update={"optimizer": Optimizer(lr=1e-3, inactive="freeze")})
    counts = held(replace(process, config=frozen)).optimizer - found.optimizer
    assert counts == (100 if zero else 400)  # a count of every element's steps, 4 bytes


# Two heads of width 3 with one key and value head over hidden 4, a gated MLP of 5 columns.
SMALL = ModelShape("llama", ((Attention(2, 1, 3, 4), Mlp(5, 4, 3)),), 4, 11, 16)
TEN = StepSize(tokens=10, sequence=5)


def test_activations_of_a_layer_by_hand():
    # A token in bf16: two norms of 8 x 4 + 8; q and result 2 x 6, k and v 2 x 3 of 2 bytes, and 4
    # for each of 2 heads; 4 x 5 columns of 2. Behind: a norm of 8 x 4. Logits: 3 x 4 x 11.
    kept = activations(SMALL, full_loads(SMALL), TEN, Setting(2))
    assert kept.layers == [10 * (2 * (32 + 8) + 2 * 18 + 8 + 40)]
    assert kept.inputs == [10 * 4 * 2] and kept.ends[1] == 10 * 32 and kept.loss.most == 10 * 132
    # Compiled: norms keep 2 x 4 values, and the MLP three times its columns.
    compiled = activations(SMALL, full_loads(SMALL), TEN, Setting(2, compiled=True))
    assert compiled.layers == [10 * (2 * (16 + 8) + 2 * 18 + 8 + 30)]


def test_what_is_not_kept_takes_nothing_and_slices_are_copies():
    [load] = full_loads(SMALL)
    half = replace(load, units=(1, 5), probability=0.5)
    kept = activations(SMALL, [half], TEN, Setting(4))
    tokens = 10 * (2 * (48 + 8) + 4 * (2 * 3 + 2 * 3) + 4 + 4 * 20)
    assert kept.layers == [0.5 * (tokens + 4 * 2 * 4 * 3)]  # and a head's rows of q, columns of o
    assert activations(SMALL, [replace(load, probability=0.0)], TEN, Setting(4)).layers == [0.0]


def test_keys_of_a_cross_attention_are_of_the_source():
    cross = (Attention(2, 2, 3, 4, cross=True),)
    shape = ModelShape("t5", ((Mlp(5, 4, 2),), cross), 4, 11, None, encoder_layers=1)
    size = StepSize(tokens=10, sequence=5, target_tokens=3, target_sequence=3)
    kept = activations(shape, full_loads(shape), size, Setting(4, activation="relu"))
    assert kept.layers[0] == 10 * (12 * 4 + 8 + 4 * 5)
    assert kept.layers[1] == 3 * (12 * 4 + 8 + 4 * 12 + 8) + 10 * 4 * 12


def outline_of(**changes):
    return make_outline(make_config(**changes))


def test_early_stages_hold_more_micro_batches_and_the_last_one_logits():
    cut = {"parallel": {"pipe": 2, "zero": 1}, "method": {"name": "full"}}
    cut["batch"] = {"global": 64, "micro": 16}
    subject = subject_of(outline_of(**cut), on_gpu=True)
    first, last = (memory_of_pipe_stage(subject, 0, 1, stage) for stage in (0, 1))
    assert first.pipe_stage == 0 and first.logits == 0 < last.logits
    batch = subject.config.batch.model_copy(update={"global_": 16})
    alone = subject.config.model_copy(update={"batch": batch})
    one = memory_of_pipe_stage(replace(subject, config=alone), 0, 1, 0)
    assert 1.6 < first.activations / one.activations < 2.2
    assert first.total_bytes == sum(first.parts.values()) > first.held_bytes


def test_checkpointing_takes_less_and_so_does_a_loss_without_logits():
    subject = subject_of(outline_of(method={"name": "full"}), on_gpu=True)
    again = subject.config.model_copy(update={"activation_checkpointing": True})
    whole = memory_of_phase(subject, 0, 1)
    assert memory_of_phase(replace(subject, config=again), 0, 1).activations < whole.activations
    logits = replace(subject, setting=replace(subject.setting, logits_at_once=None))
    assert whole.total_bytes <= memory_of_phase(logits, 0, 1).total_bytes


def test_a_loss_of_some_rows_takes_a_few_of_the_logits():
    large = replace(SMALL, hidden=1024, vocabulary=151_936)
    whole, some = (loss_bytes(4096, large, 2, at_once) for at_once in (None, 1 << 22))
    assert whole.most == 12 * 4096 * 151_936
    # 256 rows, and gradients of 4096 tokens in bf16 and of the weight in float32.
    assert some.most == 14 * 256 * 151_936 + 2 * 4096 * 1024 + 4 * 1024 * 151_936
    assert some.most < whole.most / 4 and some.output == 0 < whole.output


def test_layers_that_are_drawn_apart_may_all_come_at_once():
    method = outline_of(method={"name": "layer_drop", "drop": 0.5}).method
    assert [load.probability for load in most_loads(method, 0, (0, 4))] == [1.0] * 4
    halves = {"name": "est", "phases": [{"until": 1.0, "layers": 0.5}]}
    method = outline_of(method=halves).method
    assert sum(load.probability for load in most_loads(method, 0, (0, 4))) == pytest.approx(2)
    stage = [load.probability for load in most_loads(method, 0, (0, 2))][:2]
    assert sum(stage) == pytest.approx(2)  # both of the kept ones may be here


# GiB of `max_memory_allocated` on one H200 (tests/benchmarks/README.md, "GPU"), to which nothing is
# fitted but what compiled layers keep.
@pytest.mark.parametrize(
    ("run", "size", "compiled", "measured"),
    [
        ("est_tinyllama", (8, 2048), True, (36.7, 30.5, 23.6)),
        ("est_tinyllama", (8, 2048), False, (46.0, 37.9, 27.3)),
        ("est_gpt2", (32, 1024), False, (19.5, 12.8, 8.3)),
    ],
)
def test_estimate_is_what_an_h200_had(run, size, compiled, measured):
    section = load_run(ROOT / f"configs/run/{run}.yaml").model
    kept = ((1.0, 1.0, 1.0), (1.0, 0.5, 0.5), (0.5, 0.5, 0.5))
    for (layers, heads, columns), gib in zip(kept, measured):
        phase = {"until": 1.0, "layers": layers, "heads": heads, "columns": columns}
        fields = {"method": {"name": "est", "phases": [phase]}, "compile": compiled}
        config = run_config(section, *size, 1, precision="bf16", **fields)
        subject = subject_of(make_outline(config), on_gpu=True)
        memory = memory_of_phase(subject, 0, 1)
        assert memory.total_bytes / 2**30 == pytest.approx(gib, rel=0.01)


def test_estimate_is_what_torch_allocates(tmp_path):
    _check(compared(FAST, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_estimate_is_what_torch_allocates_in_every_layout(case, tmp_path):
    _check(compared([case], tmp_path))


def _check(lines) -> None:
    for line in lines:
        print(line)
        assert abs(line.ratio - 1) <= WITHIN, line
        assert line.held[1] / line.held[0] == pytest.approx(1, abs=WITHIN), line


LARGE = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008,
    "max_position_embeddings": 2048,
}  # fmt: skip


def test_plan_says_whether_a_gpu_holds_it_and_what_would_make_it_fit():
    sequence = {"train": "absent", "valid": "absent", "tokenizer": "absent", "sequence": 2048}
    large = {
        "model": LARGE, "precision": "bf16", "data": sequence,
        "batch": {"global": 64, "micro": 4}, "parallel": {"zero": 1, "processes": 8},
    }  # fmt: skip
    asked = Asked(gpu=gpu_of("h100-80g"), processes=8)
    memory = json.loads(plan_report(make_config(**large), True, asked=asked))["memory"]
    assert not memory["fits"] and memory["peak_bytes"] > memory["usable_bytes"]
    assert [phase["name"] for phase in memory["phases"]] == ["small", "full"]
    assert memory["peak_bytes"] == max(phase["peak_bytes"] for phase in memory["phases"])
    assert len(memory["remedies"]) >= 2
    assert any("activation_checkpointing=true" in r["set"] for r in memory["remedies"])
    text = plan_report(make_config(**large), False, asked=asked)
    assert "no: " in text and "would fit  parallel.zero=3" in text
    block = text[text.index("memory of h100-80g") : text.index("8 x h100-80g")]
    assert max(map(len, block.splitlines())) <= 80 and block.isascii()


def test_a_plan_for_a_gpu_has_one_estimate_of_its_memory_in_fp32_too():
    config = make_config(precision="fp32", batch={"global": 256, "micro": 256})
    asked, outline = Asked(gpu=gpu_of("h100-80g")), make_outline(config)
    peak = memory_of(outline, gpu=asked.gpu).total_bytes
    assert gibibytes(peak) != gibibytes(memory_of(outline).total_bytes)  # kernels of a CPU
    text = " ".join(plan_report(config, False, asked=asked).split())
    assert f"memory {gibibytes(peak)} of tensors at most" in text


def test_remedies_fit_and_no_larger_micro_batch_does():
    gpu, outline = gpu_of("l4"), outline_of(method={"name": "full"})
    tiny = replace(gpu, memory_bytes=memory_of_phase(subject_of(outline, False), 0, 1).total_bytes)
    found = largest_micro(outline, tiny)
    assert found is not None and found.micro == 1 and found.set == ("batch.micro=1",)
    first, *_ = remedies(outline, tiny)
    assert first == found and first.peak_bytes <= usable_bytes(tiny)
    assert largest_micro(outline, replace(tiny, memory_bytes=1000.0)) is None
    assert list(remedies(outline, replace(tiny, memory_bytes=1000.0))) == []
    # Where the micro-batch decides what is dropped, no other is tried.
    dropping = outline_of(
        method={"name": "full"},
        model={
            "model_type": "gpt2",
            "n_embd": 64,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 64,
            "vocab_size": 512,
        },
    )
    assert largest_micro(dropping, tiny) is None
