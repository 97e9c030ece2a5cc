"""Runs whose memory is measured: families, layouts, precisions and methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cases.tiny import make_config


@dataclass(frozen=True)
class MemoryCase:
    """A run of processes on this machine.

    Attributes:
        model: the `model` section.
        settings: sections of the run file that differ from those of `run_of`.
    """

    processes: int
    model: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


VOCABULARY, SEQUENCE, LAYERS = 1024, 128, 4
_SIZES = dict(hidden_size=128, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
_HEADS = dict(num_attention_heads=4, max_position_embeddings=SEQUENCE)
LLAMA = dict(model_type="llama", **_SIZES, **_HEADS, num_key_value_heads=2, intermediate_size=352)
WIDE = {**LLAMA, "hidden_size": 384, "intermediate_size": 1056, "vocab_size": 256} | dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads"), 12
)
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 48, "tie_word_embeddings": True}
GPT2 = dict(
    model_type="gpt2", n_embd=128, n_layer=LAYERS, n_head=4, n_positions=SEQUENCE,
    vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0,
)
_KEPT = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
BERT = dict(
    model_type="bert", **_SIZES, **_HEADS, intermediate_size=512, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
T5 = dict(
    model_type="t5", d_model=128, d_kv=32, num_heads=4, d_ff=384, num_layers=2,
    num_decoder_layers=2, vocab_size=VOCABULARY, dropout_rate=0.0,
)
# The library's scan goes from position to position: fewer layers, and one micro-batch.
MAMBA = dict(model_type="mamba", **_SIZES, expand=2, state_size=8, time_step_rank=8) | {
    "num_hidden_layers": 2
}
MAMBA2 = dict(
    model_type="mamba2", **_SIZES, expand=2, num_heads=8, head_dim=32, n_groups=2, state_size=16,
    chunk_size=32,
)

_NARROW = {"heads": 0.5, "columns": 0.5}
EST = {
    "name": "est",
    "balance_groups": 2,
    "phases": [{"until": 0.3, "layers": 0.5, **_NARROW}, {"until": 0.6, **_NARROW}, {"until": 1.0}],
}
HALVES = {"name": "raptr", "phases": [{"until": 0.5, "layers": 0.5}, {"until": 1.0}]}
TOKENS = {"name": "token_drop", "start": 0.5, "until": 0.5}
BY_MICRO_BATCH = {**EST, "draw": "micro_batch"}
# As in a model of a billion parameters: matrices are cut, and a bucket holds a part of them.
CUT = {"stage3_param_persistence_threshold": 1000, "reduce_bucket_size": 200_000}


def _zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"parallel": {"zero": stage, **more}}


def _options(**options: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": options}}


_BF16 = {"precision": "bf16"}
_AGAIN = {"activation_checkpointing": True}
_MLM = {"objective": {"name": "mlm", "vocabulary": VOCABULARY}}
_UL2 = {"objective": {"name": "ul2", "vocabulary": VOCABULARY}}
_FROZEN = {"optimizer": {"lr": 1e-4, "inactive": "freeze"}}

FEW = {"batch": {"global": 2, "micro": 1}, "data": {"sequence": 32}}
_APART = {"data": {"documents": "separate"}}

CASES = {
    "llama, est, fp32, ZeRO 0": MemoryCase(1, LLAMA, {**_zero(0), "method": EST}),
    "llama, bf16, ZeRO 2 of 2": MemoryCase(2, LLAMA, {**_zero(2), **_BF16}),
    "gpt2 with dropout, fp32, ZeRO 1 of 2": MemoryCase(2, GPT2, _zero(1)),
    "bert, raptr, bf16, ZeRO 2 of 2": MemoryCase(
        2, BERT, {**_zero(2), **_BF16, **_MLM, "method": HALVES}
    ),
    "t5, bf16, ZeRO 1": MemoryCase(1, T5, {**_zero(1), **_BF16, **_UL2}),
    "qwen3, bf16, ZeRO 3 of 2, checkpointing": MemoryCase(
        2, QWEN, {**_zero(3), **_BF16, **_AGAIN, **_options(**CUT)}
    ),
    "llama, est, fp32, ZeRO 3 of 2": MemoryCase(
        2, LLAMA, {**_zero(3), **_options(**CUT), "method": EST}
    ),
    "llama, bf16, ZeRO 2 of 2, offload": MemoryCase(2, LLAMA, {**_zero(2, offload=True), **_BF16}),
    "llama, est, bf16, pipe 2 x 2, ZeRO 1": MemoryCase(
        4, LLAMA, {**_zero(1, pipe=2), **_BF16, "method": EST}
    ),
    # Few tokens: the most is there where gradients are reduced, of kept units alone.
    "wide llama, est, fp32, ZeRO 1 of 2": MemoryCase(2, WIDE, {**_zero(1), "method": EST, **FEW}),
    "gpt2, fp32, pipe 2, ZeRO 0, checkpointing": MemoryCase(
        2, GPT2 | _KEPT, {**_zero(0, pipe=2), **_AGAIN}
    ),
    "mamba, fp32, ZeRO 2": MemoryCase(
        1, MAMBA, {**_zero(2), "batch": {"global": 2, "micro": 2}}
    ),
    "mamba2, bf16, ZeRO 1": MemoryCase(1, MAMBA2, {**_zero(1), **_BF16}),
    "llama, est by micro-batch, bf16, ZeRO 1 of 2, freeze": MemoryCase(
        2, LLAMA, {**_zero(1), **_BF16, **_FROZEN, "method": BY_MICRO_BATCH}
    ),
    "the same, as DeepSpeed reduces": MemoryCase(
        2,
        LLAMA,
        {
            **_zero(1),
            **_BF16,
            **_FROZEN,
            **_options(contiguous_gradients=True),
            "method": BY_MICRO_BATCH,
        },
    ),
    "the same, ZeRO 2 of 2, freeze": MemoryCase(
        2, LLAMA, {**_zero(2), **_BF16, **_FROZEN, "method": BY_MICRO_BATCH}
    ),
    "llama, est by micro-batch, bf16, ZeRO 2 of 2": MemoryCase(
        2, LLAMA, {**_zero(2), **_BF16, "method": BY_MICRO_BATCH}
    ),
    "gpt2, token_drop, fp32, ZeRO 1": MemoryCase(
        1, GPT2 | _KEPT, {**_zero(1), "method": TOKENS}
    ),
    "llama, documents apart, fp32, ZeRO 1": MemoryCase(1, LLAMA, {**_zero(1), **_APART}),
    "llama, documents apart, bf16, ZeRO 1": MemoryCase(1, LLAMA, {**_zero(1), **_BF16, **_APART}),
}  # fmt: skip


def run_of(case: MemoryCase) -> dict[str, Any]:
    """The run file of a case: four micro-batches of two sequences on every replica."""
    pipe = case.settings.get("parallel", {}).get("pipe", 1)
    replicas = case.processes // pipe
    data = make_config().model_dump(by_alias=True)["data"] | {"sequence": SEQUENCE}
    tree = {
        "run_dir": "unset",
        "steps": 1000,
        "model": case.model,
        "method": {"name": "full"},
        "batch": {"global": 8 * replicas, "micro": 2},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"every": 1000},
        "evaluate": {"every": 1000, "sequences": 1},
    }
    return tree | case.settings | {"data": data | case.settings.get("data", {})}
