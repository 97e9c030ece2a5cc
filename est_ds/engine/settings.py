"""DeepSpeed's config from the run file, and the keys that users may not set there."""

from __future__ import annotations

from typing import Any

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
    "zero_optimization.offload_optimizer": (
        "with it DeepSpeed applies the last gradient of a skipped layer again at every step"
    ),
    "zero_optimization.offload_param": "it needs ZeRO 3",
}

REFUSED_WITH_PIPELINE = {
    "wall_clock_breakdown": "DeepSpeed's timers fail in the pipeline engine",
    "flops_profiler": "DeepSpeed's profiler fails in the pipeline engine; see `est-ds plan`",
}


def check_deepspeed_section(config: RunConfig) -> None:
    """Refuses keys of `deepspeed:` that est_ds owns or that cannot work.

    Raises:
        UserError: such a key is set.
    """
    section = config.deepspeed
    for key, field in OWNED.items():
        if _holds(section, key):
            raise UserError(f"deepspeed.{key} is set by est_ds; remove it and set {field} instead.")
    refused = dict(REFUSED)
    if config.parallel.pipe > 1:
        refused |= REFUSED_WITH_PIPELINE
    for key, reason in refused.items():
        if _holds(section, key):
            raise UserError(f"deepspeed.{key} is refused: {reason}; remove it.")


def _holds(section: dict[str, Any], dotted: str) -> bool:
    """Whether the key is set to anything but a plain 'off'."""
    node: Any = section
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    off = {"enabled": False}
    return node is not False and node is not None and node != off


def deepspeed_config(
    config: RunConfig, *, data_parallel: int, parameters: int, tensorboard_dir: str
) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes."""
    bucket = min(500_000_000, max(1, parameters))
    ours = {
        "train_batch_size": config.batch.global_,
        "train_micro_batch_size_per_gpu": config.batch.micro,
        "gradient_accumulation_steps": config.batch.accumulation(data_parallel),
        "gradient_clipping": config.optimizer.clip,
        "steps_per_print": None,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": {
            "stage": config.parallel.zero,
            # DeepSpeed allocates buckets whole: no larger than the model.
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "tensorboard": {"enabled": True, "output_path": tensorboard_dir, "job_name": "."},
    }
    return _merged(ours, config.deepspeed)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
