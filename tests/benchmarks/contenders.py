"""The training loops that dense.py compares. Each is started by it: contenders.py NAME OPTIONS.

All train a Llama of the same shapes with cross-entropy, clipping at 1.0 and fused AdamW on the
same batches, in fp32, one optimizer step a batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import model_section, random_batch, run_config, zero_engine
from gate import gated, own_output
from torch.nn.functional import cross_entropy

LR, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0
NEVER = 10**9


def bare(section: dict, size: dict, batches) -> None:
    """PyTorch over the Hugging Face model."""
    model = _hugging_face(section)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True
    )
    for ids, labels in batches:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()


def est_ds(section: dict, size: dict, batches, zero: int, deepspeed: dict) -> None:
    """The engine of `est-ds train`, method full."""
    from est_ds.plans.lr import learning_rate
    from est_ds.plans.methods import build_method

    config = run_config(section, zero=zero, deepspeed=deepspeed, **size)
    engine, shape = zero_engine(config)
    method = build_method(config.method, seed=0, steps=config.steps, shape=shape)
    for step, batch in enumerate(batches):
        step %= config.steps
        engine.set_learning_rate(
            learning_rate(config.schedule, config.optimizer.lr, step, config.steps)
        )
        with engine.subnetwork.active(method.plan(step)):
            engine.train_batch(iter([batch]))


def trainer(section: dict, size: dict, batches, zero: int = 0) -> None:
    """Hugging Face's Trainer, alone or with DeepSpeed's ZeRO."""
    if zero:
        _start_deepspeed()
    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            for ids, labels in batches:
                for row in range(len(ids)):
                    # The library shifts labels itself: its rows are one token longer.
                    whole = torch.cat([ids[row], labels[row, -1:]])
                    yield {"input_ids": whole, "labels": whole}

    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=size["batch"],
        max_steps=NEVER,
        learning_rate=LR,
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        deepspeed=_zero_settings(zero, size["batch"]) if zero else None,
    )
    section = dict(section, max_position_embeddings=size["sequence"] + 1)
    loop = Trainer(_hugging_face(section), arguments, train_dataset=Rows())
    assert loop.is_deepspeed_enabled == bool(zero)
    loop.train()


def _zero_settings(stage: int, batch: int) -> dict:
    """DeepSpeed's own defaults around the Trainer's optimizer."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _start_deepspeed() -> None:
    """A group of one process, without the compilations that DeepSpeed starts with on a CPU."""
    from est_ds.engine.start import start_processes
    from est_ds.ranks.world import World

    start_processes(World.from_environment())


def litgpt_fit(section: dict, size: dict, batches) -> None:
    """litgpt's own model in its pretraining loop."""
    import lightning
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.pretrain import fit

    model = _litgpt(section, size["sequence"])
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.launch()
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True
    )
    state = {"model": model, "optimizer": fabric.setup_optimizers(optimizer)}
    rows = (torch.cat([ids, labels[:, -1:]], dim=1) for ids, labels in batches)
    sanity = [torch.zeros(1, size["sequence"] + 1, dtype=torch.int64)]
    fit(
        fabric,
        1,
        state | {"iter_num": 0, "step_count": 0},
        rows,
        sanity,
        Path(tempfile.mkdtemp()),
        None,
        TrainArgs(
            save_interval=None,
            log_interval=NEVER,
            global_batch_size=size["batch"],
            micro_batch_size=size["batch"],
            lr_warmup_steps=100,
            max_tokens=NEVER * size["batch"] * size["sequence"],
            max_norm=CLIP,
        ),
        EvalArgs(interval=NEVER, final_validation=False),
    )


def litgpt_bare(section: dict, size: dict, batches) -> None:
    """litgpt's own model in the same loop as `bare`."""
    model = _litgpt(section, size["sequence"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True
    )
    for ids, labels in batches:
        loss = cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()


def _hugging_face(section: dict) -> torch.nn.Module:
    from est_ds.slicing.build import build_model
    from est_ds.slicing.families import hf_config

    return build_model(hf_config(section), seed=0).train()


def _litgpt(section: dict, sequence: int) -> torch.nn.Module:
    from litgpt import GPT, Config

    config = Config(
        block_size=sequence,
        vocab_size=section["vocab_size"],
        padded_vocab_size=section["vocab_size"],
        n_layer=section["num_hidden_layers"],
        n_head=section["num_attention_heads"],
        n_query_groups=section["num_key_value_heads"],
        n_embd=section["hidden_size"],
        intermediate_size=section["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    model.max_seq_length = sequence
    return model


CONTENDERS = {
    "bare": bare,
    "est_ds_zero0": partial(est_ds, zero=0),
    "est_ds_zero1": partial(est_ds, zero=1),
    "trainer": trainer,
    "trainer_zero1": partial(trainer, zero=1),
    "litgpt_bare": litgpt_bare,
    "litgpt_fit": litgpt_fit,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("options", type=json.loads)
    arguments = parser.parse_args()
    pipe, options = own_output(), arguments.options
    torch.set_num_threads(options["threads"])
    size = {"batch": options["batch"], "sequence": options["sequence"]}
    section = model_section(
        "llama", options["hidden"], options["layers"], options["vocabulary"], size["sequence"]
    )
    batches = (
        random_batch(**size, vocabulary=options["vocabulary"], seed=i) for i in itertools.count()
    )
    contender = CONTENDERS[arguments.name]
    more = {"deepspeed": options["deepspeed"]} if arguments.name.startswith("est_ds") else {}
    contender(section, size, gated(batches, pipe), **more)


if __name__ == "__main__":
    main()
