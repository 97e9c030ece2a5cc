"""Tiny runs of every family and objective, to be exported, and how a user loads an export."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
import yaml

from cases.objectives import BERT, T5
from cases.tiny import TINY_MODEL
from est_ds import cli
from est_ds.config.run_file import load_run
from est_ds.run.prepare import prepare
from workers import train_all

STEPS = 2
SEQUENCE = 32
LLAMA = {**TINY_MODEL, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 560}
GPT2 = {
    "model_type": "gpt2", "vocab_size": 560, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 16},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "tie_word_embeddings": True},
    "gpt2": GPT2,
    "bert": BERT,
    "mamba": {
        "model_type": "mamba",
        "vocab_size": 560,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
    },
    "mamba2": {
        "model_type": "mamba2",
        "vocab_size": 560,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "state_size": 8,
        "chunk_size": 16,
    },
    "t5": T5,
    "t5 v1.1": {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "mamba", "mamba2")
CELLS = [
    *((model, "causal", "fp32") for model in DECODERS),
    *((model, "ul2", "fp32") for model in (*DECODERS, "t5", "t5 v1.1")),
    ("bert", "mlm", "fp32"),
    *((model, "causal apart", "fp32") for model in ("llama", "mistral", "gpt2")),
    ("bert", "mlm apart", "fp32"),
    *(("gpt2", "causal", "bf16"), ("bert", "mlm", "bf16"), ("t5", "ul2", "bf16")),
]
# One of each way in which an export was wrong.
FAST = [
    cell
    for cell in CELLS
    if cell[2] == "fp32"
    and (
        cell[0] in ("bert", "t5", "t5 v1.1")
        or cell[:2] in (("gpt2", "causal"), ("qwen3", "causal"), ("mamba2", "causal"))
    )
    and "apart" not in cell[1]
]


def named(cell) -> str:
    return "-".join(cell).replace(" ", "_")


def train_cells(folder: Path, corpus: Path, cells) -> dict[tuple, Path]:
    """Trains cells, all in one start of one process; each one's run directory."""
    jobs = []
    for cell in cells:
        model, (objective, *apart), precision = cell[0], cell[1].split(), cell[2]
        data = {name: str(corpus / name) for name in ("train", "valid", "tokenizer")}
        tree = {
            "run_dir": str(folder / named(cell)),
            "seed": 3,
            "steps": STEPS,
            "precision": precision,
            "model": MODELS[model],
            "method": {"name": "full"},
            "objective": {"name": objective},
            "data": {**data, "sequence": SEQUENCE, "documents": "separate" if apart else "joined"},
            "batch": {"global": 4, "micro": 2},
            "optimizer": {"lr": 3e-3},
            "parallel": {"pipe": 1, "zero": 1, "processes": 1},
            "checkpoint": {"every": 1, "keep_last": 0},
            "evaluate": {"every": STEPS, "sequences": 5},
        }
        file = folder / f"{named(cell)}.yaml"
        file.write_text(yaml.safe_dump(tree))
        jobs.append({"run": file, "overrides": []})
    train_all(folder / "processes", 1, jobs)
    return {cell: folder / named(cell) for cell in cells}


def exported(run_dir: Path, *arguments: str) -> Path:
    cli.main(["export", str(run_dir), *arguments])
    return run_dir / "export"


def load(folder: Path, run_dir: Path):
    """What a user loads, without a word about est_ds; and the run, for its held-out samples."""
    run = prepare(load_run(run_dir), 1)
    auto = getattr(transformers, run.family.auto_class)
    dtype = torch.bfloat16 if run.config.precision == "bf16" else torch.float32
    model = auto.from_pretrained(folder, dtype=dtype)
    return run, model, transformers.AutoTokenizer.from_pretrained(folder)
