"""Tiny models of every family at random weights and tokens, to be measured without a training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cases.tiny import make_config
from est_ds.analysis.subject import Batch, Subject
from est_ds.design import make_design
from est_ds.slicing.build import build_model

VOCABULARY, SEQUENCE = 11, 6
LLAMA = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6,
    "max_position_embeddings": 8,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2,
    "n_inner": 6, "n_positions": 8, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
BERT = {
    "model_type": "bert", "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 6, "max_position_embeddings": 8,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 6,
    "num_layers": 3, "num_decoder_layers": 3, "num_heads": 2, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
MAMBA = {
    "model_type": "mamba", "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 3,
    "state_size": 4,
}  # fmt: skip
OBJECTIVES = {"bert": {"name": "mlm"}, "t5": {"name": "ul2"}}


def subject_of(section: dict, std: float = 0.4, batches: int = 2) -> Subject:
    """A model with weights large enough for every part to matter, and batches of two windows."""
    kind = section["model_type"]
    objective = OBJECTIVES.get(kind, {"name": "causal"})
    data = {name: "absent" for name in ("train", "valid", "tokenizer")}
    changes = {"model": section, "method": {"name": "full"}, "objective": objective}
    changes["data"] = {**data, "sequence": 64 if kind == "t5" else 8}
    design = make_design(make_config(**changes))
    model = build_model(design.hf_config, 0)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std, generator=draw)
    some = []
    for _ in range(batches):
        ids = torch.randint(VOCABULARY, (2, SEQUENCE), generator=draw)
        inputs = (ids, ids.flip(1)) if kind == "t5" else (ids,)
        labels = torch.randint(VOCABULARY, (2, SEQUENCE), generator=draw)
        some.append(Batch(design.family.named_inputs(inputs), labels, 1 / batches))
    return Subject(design, 20, model.eval(), tuple(some))


def plain_losses(subject: Subject, model: nn.Module | None = None) -> Tensor:
    """Mean cross-entropy of every window, by the library alone."""
    model = model or subject.model
    with torch.no_grad():
        return torch.cat(
            [
                cross_entropy(
                    model(**b.named).logits.transpose(1, 2), b.labels, reduction="none"
                ).mean(1)
                for b in subject.batches
            ]
        )
