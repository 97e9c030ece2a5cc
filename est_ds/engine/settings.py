"""DeepSpeed's config from the run file, and its own check of what is passed on."""

from __future__ import annotations

from typing import Any

import torch

from est_ds.config.deepspeed_keys import reduces_flat
from est_ds.config.run_config import RunConfig
from est_ds.errors import UserError

NEEDS_GPU = ("zero_quantized_gradients", "zero_quantized_weights")


def check_zero_section(config: RunConfig) -> None:
    """Has DeepSpeed check the values of `deepspeed.zero_optimization`, whose keys are known.

    Raises:
        UserError: a value is wrong, or needs a GPU.
    """
    section, where = config.deepspeed.get("zero_optimization", {}), "deepspeed.zero_optimization"
    for key in NEEDS_GPU:
        if section.get(key) and not torch.cuda.is_available():
            raise UserError(f"{where}.{key} needs a GPU: DeepSpeed has no kernel for CPUs.")
    if not section:
        return
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except (ValidationError, ValueError, TypeError) as e:
        first = e.errors()[0] if isinstance(e, ValidationError) else {"loc": (), "msg": str(e)}
        field = ".".join([where, *map(str, first["loc"])])
        raise UserError(f"{field}: {first['msg']} (DeepSpeed's own check); correct it.") from None


def deepspeed_config(config: RunConfig, *, data_parallel: int, parameters: int) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes."""
    bucket = min(500_000_000, max(2, parameters + parameters % 2))  # DeepSpeed wants it even
    zero: dict[str, Any] = {
        "stage": config.parallel.zero,
        # DeepSpeed allocates buckets whole: no larger than the model.
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if reduces_flat(config):
        zero["contiguous_gradients"] = False
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
    }
    return _merged(ours, config.deepspeed)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
