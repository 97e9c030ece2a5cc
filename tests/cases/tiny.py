"""The smallest run that has everything: phases, pipe stages, replicas, checkpoints."""

from est_ds.config.run_config import RunConfig

TINY_MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}

TINY_RUN = {
    "seed": 3,
    "steps": 20,
    "model": TINY_MODEL,
    "method": {
        "name": "est",
        "balance_groups": 2,
        "phases": [
            {"name": "small", "until": 8, "layers": 0.5, "heads": 0.5, "columns": 0.5},
            {"name": "narrow", "until": 14, "heads": 0.5, "columns": 0.5},
            {"name": "full", "until": 20},
        ],
    },
    "batch": {"global": 8, "micro": 2},
    "parallel": {"pipe": 2, "zero": 1, "processes": 4},
    "optimizer": {"lr": 3e-3},
    "schedule": {"name": "cosine", "warmup": 2},
    "checkpoint": {"every": 5, "keep_last": 0},
    "evaluate": {"every": 10, "sequences": 10},
    "log": {"step_times": False},
}

SMALL = {"name": "small", "until": 5, "layers": 0.5, "heads": 0.5, "columns": 0.5}
EST = {"name": "est", "balance_groups": 2, "phases": [SMALL, {"name": "full", "until": 20}]}


def make_config(**changes) -> RunConfig:
    """A run of which no data is there, for what reads none."""
    tree = {
        "run_dir": "unset",
        "steps": 20,
        "model": TINY_MODEL,
        "method": EST,
        "data": {"train": "absent", "valid": "absent", "tokenizer": "absent", "sequence": 64},
        "batch": {"global": 8, "micro": 2},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 5},
        "evaluate": {"every": 5, "sequences": 4},
    }
    return RunConfig.model_validate({**tree, **changes})
