"""The smallest run that has everything: phases, pipe stages, replicas, checkpoints."""

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
}
