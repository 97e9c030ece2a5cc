"""DeepSpeed's config from the run file, and the keys that users may not set there."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from est_ds.config import RunConfig
from est_ds.errors import UserError

# Keys of `deepspeed:` that est_ds owns, and the field to use instead.
OWNED = {
    "train_batch_size": "batch.global",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.global and batch.micro",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "steps_per_print": "log.every",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision (fp32 or bf16)",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer": "parallel.offload",
    "zero_force_ds_cpu_optimizer": "parallel.offload",
    "data_types.grad_accum_dtype": "precision (gradients are accumulated in fp32)",
    "tensorboard": "run_dir (TensorBoard's files stand in run_dir/tensorboard)",
    "pipeline.activation_checkpoint_interval": "activation_checkpointing",
    "checkpoint": "checkpoint",
}

# Keys that would silently train something else, crash, or do nothing, and why.
REFUSED = {
    "progressive_layer_drop": "DeepSpeed 0.19 removed it; choose a method under `method`",
    "elasticity": "DeepSpeed 0.19 removed it",
    "eigenvalue": "DeepSpeed 0.19 removed it",
    "curriculum_learning": "DeepSpeed 0.19 removed it",
    "compression_training": "DeepSpeed 0.19 removed it",
    "nebula": "DeepSpeed 0.19 removed it",
    "amp": "DeepSpeed 0.19 removed it; set precision",
    "data_efficiency": "its samplers would replace the data order, a function of seed and step",
    "zero_optimization.round_robin_gradients": "its universal checkpoints restore wrong weights",
}

REFUSED_WITH_PIPELINE = {
    "wall_clock_breakdown": "DeepSpeed's timers fail in the pipeline engine",
    "flops_profiler": "DeepSpeed's profiler fails in the pipeline engine; see `est-ds plan`",
}


# Other top-level keys that DeepSpeed 0.19 reads; it ignores unknown ones without a word.
KNOWN = (
    "aio", "comet", "comms_logger", "communication_data_type", "compile", "csv_monitor",
    "data_types", "disable_allgather", "dump_state", "flops_profiler", "gradient_predivide_factor",
    "graph_harvesting", "memory_breakdown", "pipeline", "prescale_gradients",
    "seq_parallel_communication_data_type", "sparse_gradients", "timers", "torch_autocast", "wandb",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)  # fmt: skip


def check_deepspeed_section(config: RunConfig) -> None:
    """Refuses keys of `deepspeed:` that est_ds owns or that cannot work.

    Raises:
        UserError: such a key is set.
    """
    if config.precision == "bf16" and config.parallel.zero == 0:
        raise UserError(
            "precision='bf16' with parallel.zero=0: DeepSpeed then accumulates gradients in bf16; "
            "set parallel.zero=1, which takes no more memory."
        )
    section = config.deepspeed
    for key, field in OWNED.items():
        if _holds(section, key, even_off=True):
            raise UserError(f"deepspeed.{key} is set by est_ds; remove it and set {field} instead.")
    refused = dict(REFUSED)
    if config.parallel.pipe > 1:
        refused |= REFUSED_WITH_PIPELINE
    for key, reason in refused.items():
        if _holds(section, key):
            raise UserError(f"deepspeed.{key} is refused: {reason}; remove it.")
    for key in section:
        if key not in KNOWN and key not in refused:
            near = difflib.get_close_matches(str(key), KNOWN, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"unknown key 'deepspeed.{key}'; {hint}Known here: {', '.join(KNOWN)}."
            )
    if "zero_optimization" in section:
        _check_zero_section(section["zero_optimization"])


def _check_zero_section(section: Any) -> None:
    if not isinstance(section, dict):
        raise UserError(f"deepspeed.zero_optimization={section!r}: must be a mapping of keys.")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except (ValidationError, ValueError, TypeError) as e:
        first = e.errors()[0] if isinstance(e, ValidationError) else {"loc": (), "msg": str(e)}
        field = ".".join(["deepspeed.zero_optimization", *map(str, first["loc"])])
        raise UserError(f"{field}: {first['msg']} (DeepSpeed's own check); correct it.") from None


def _holds(section: dict[str, Any], dotted: str, even_off: bool = False) -> bool:
    """Whether the key is set, to anything but a plain 'off' unless `even_off`."""
    node: Any = section
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    off = {"enabled": False}
    return even_off or node is not False and node is not None and node != off


def deepspeed_config(
    config: RunConfig, *, data_parallel: int, parameters: int, tensorboard_dir: str
) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes."""
    bucket = min(500_000_000, max(1, parameters))
    zero: dict[str, Any] = {
        "stage": config.parallel.zero,
        # DeepSpeed allocates buckets whole: no larger than the model.
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    ours = {
        "train_batch_size": config.batch.global_,
        "train_micro_batch_size_per_gpu": config.batch.micro,
        "gradient_accumulation_steps": config.batch.accumulation(data_parallel),
        "gradient_clipping": config.optimizer.clip,
        "steps_per_print": None,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        # torch's fused AdamW also serves on the host, and needs no compiler there.
        "zero_force_ds_cpu_optimizer": False,
        "tensorboard": {"enabled": True, "output_path": tensorboard_dir, "job_name": "."},
    }
    return _merged(ours, config.deepspeed)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
