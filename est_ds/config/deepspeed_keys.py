"""The section `deepspeed:` of a run file: which of DeepSpeed's keys are passed on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from est_ds.config.run_config import RunConfig
from est_ds.errors import UserError, did_you_mean

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
    "pipeline.activation_checkpoint_interval": "activation_checkpointing",
    "checkpoint": "checkpoint",
}

_REMOVED = "DeepSpeed 0.19 removed it"
_CHECKPOINTS = "est_ds writes its own checkpoints, so that it has no effect"

# Keys that would silently train something else, crash, hang, or do nothing, and why.
REFUSED = {
    "progressive_layer_drop": f"{_REMOVED}; choose a method under `method`",
    "elasticity": f"{_REMOVED}; a run resumes with any number of processes",
    "eigenvalue": _REMOVED,
    "curriculum_learning": _REMOVED,
    "compression_training": _REMOVED,
    "nebula": _REMOVED,
    "sparse_gradients": _REMOVED,
    "graph_harvesting": _REMOVED,
    "amp": f"{_REMOVED}; set precision",
    "torch_autocast": "with it training hangs; set precision",
    "compile": "DeepCompile takes a static graph, which a plan changes; set compile=true",
    "data_efficiency": "its samplers would replace the data order, a function of seed and step",
    "pipeline": "est_ds cuts the pipeline; see parallel.pipe and parallel.pipe_layers",
    "aio": "it is for offloading to NVMe, which is not supported; see parallel.offload",
    "zero_allow_untested_optimizer": "the optimizer is est_ds's AdamW, so that it has no effect",
    "seq_parallel_communication_data_type": "there is no sequence parallelism here",
    "disable_allgather": "it has no effect in DeepSpeed 0.19",
    "zero_optimization.round_robin_gradients": (
        "DeepSpeed's universal checkpoints then restore wrong weights from tables that est_ds reads"
    ),
    "zero_optimization.zenflow": (
        "it updates a parameter from gradients of several steps, in which it need not be trained"
    ),
    "zero_optimization.leaf_module": "what is in a leaf is gathered together, skipped or not",
    "zero_optimization.stage3_module_granularity_threshold": (
        "what is in a leaf is gathered together, skipped or not"
    ),
    "zero_optimization.compute_grad_norm": "optimizer.clip and metrics.jsonl need the norm",
    "zero_optimization.load_from_fp32_weights": _CHECKPOINTS,
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.cpu_offload": "DeepSpeed 0.19 deprecates it; set parallel.offload",
    "zero_optimization.mics_shard_size": _REMOVED,
}

REFUSED_WITH_PIPELINE = {
    "zero_optimization.overlap_comm": "DeepSpeed turns it off in a pipeline",
    "wall_clock_breakdown": "DeepSpeed's timers fail in the pipeline engine",
    "flops_profiler": "DeepSpeed's profiler fails in the pipeline engine; see `est-ds plan`",
}

# Keys that are passed on, and the ZeRO stages under which they take effect; a pipeline counts as
# its ZeRO stage. `configs/LAYOUTS.md` says which of them have been tried where.
_ALL, _SHARDED = (0, 1, 2, 3), (1, 2, 3)
WORKS = {
    "comet": _ALL,
    "comms_logger": _ALL,
    "communication_data_type": _ALL,
    "csv_monitor": _ALL,
    "dump_state": _ALL,
    "flops_profiler": _ALL,
    "gradient_predivide_factor": (0, 1),
    "memory_breakdown": _ALL,
    "prescale_gradients": (0, 1),
    "tensorboard": _ALL,
    "timers": _ALL,
    "wall_clock_breakdown": _ALL,
    "wandb": _ALL,
    "zero_optimization": _ALL,
}
ZERO_WORKS = {
    "allgather_bucket_size": (1, 2),
    "allgather_partitions": (1, 2),
    "contiguous_gradients": _SHARDED,
    "overlap_comm": _SHARDED,
    "reduce_bucket_size": _SHARDED,
    "reduce_scatter": _SHARDED,
    "use_multi_rank_bucket_allreduce": (1, 2),
    "memory_efficient_linear": (3,),
    "offload_param": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
    "stage3_model_persistence_threshold": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_prefetch_bucket_size": (3,),
    "sub_group_size": (3,),
    "use_all_reduce_for_fetch_params": (3,),
    "zero_hpz_partition_size": (3,),
    "zero_quantized_gradients": (3,),
    "zero_quantized_weights": (3,),
}

# Elements, and the fewest that DeepSpeed takes.
ZERO_SIZES = {
    "allgather_bucket_size": 0,
    "reduce_bucket_size": 1,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "sub_group_size": 0,
}

WIDTHS = ("fp32", "bf16", "fp16")  # in which gradients are reduced

# Keys with which a run file asks for DeepSpeed's own way from gradients to AdamW.
OTHER_WAYS = {"communication_data_type", "gradient_predivide_factor", "prescale_gradients"}
OTHER_ZERO_WAYS = {
    "contiguous_gradients",
    "overlap_comm",
    "reduce_scatter",
    "use_multi_rank_bucket_allreduce",
}


def reduces_flat(config: RunConfig) -> bool:
    """Whether gradients are reduced straight into the tensor that AdamW reads."""
    section = config.deepspeed
    asked = OTHER_WAYS & section.keys()
    asked |= OTHER_ZERO_WAYS & section.get("zero_optimization", {}).keys()
    return config.parallel.zero == 1 and not config.parallel.offload and not asked


def steps_in_place(config: RunConfig) -> bool:
    """Whether AdamW steps the weights that the model computes with, and no copy of them, where
    ZeRO keeps one."""
    parallel = config.parallel
    return config.precision == "fp32" and parallel.zero in (1, 2) and not parallel.offload


def check_deepspeed_section(config: RunConfig) -> None:
    """Refuses keys of `deepspeed:` that est_ds owns, that cannot work, or that have no effect.

    Raises:
        UserError: such a key is set, or a precision that a layout has not.
    """
    zero = config.parallel.zero
    if config.precision == "bf16" and zero == 0:
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
        if _holds(section, key, even_off=key == "zero_optimization.compute_grad_norm"):
            raise UserError(f"deepspeed.{key} is refused: {reason}; remove it.")
    for name in config.log.to:
        if _holds(section, name):
            raise UserError(
                f"log.to={name} and deepspeed.{name} would both show every figure; remove one of "
                f"them."
            )
    _check_keys(section, "deepspeed", WORKS, REFUSED, zero)
    _check_values(section)
    if "zero_optimization" in section:
        _check_zero_section(section["zero_optimization"], zero)


def _check_values(section: dict[str, Any]) -> None:
    """Checks what DeepSpeed takes as it is, or finds wrong when processes have started."""
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "communication_data_type": (lambda x: x in WIDTHS, f"use {', '.join(WIDTHS)}"),
        "gradient_predivide_factor": (
            lambda x: type(x) in (int, float) and 0 < x < math.inf, "use a number above 0"
        ),
        "prescale_gradients": (lambda x: type(x) is bool, "use true or false"),
    }  # fmt: skip
    for key, (is_allowed, use) in checks.items():
        if key in section and not is_allowed(section[key]):
            raise UserError(f"deepspeed.{key}={section[key]!r}: {use}, or remove it.")


def _check_keys(
    section: dict[str, Any],
    where: str,
    works: dict[str, tuple[int, ...]],
    refused: Iterable[str],
    zero: int,
) -> None:
    for key in section:
        if key not in works and key not in refused:
            hint = did_you_mean(key, works)
            raise UserError(
                f"{where}.{key} is not passed on to DeepSpeed; {hint}Passed on are: "
                f"{', '.join(works)}."
            )
        if zero not in works.get(key, (zero,)):
            stages = " or ".join(map(str, works[key]))
            raise UserError(
                f"{where}.{key} takes effect with ZeRO {stages} only, and parallel.zero={zero}; "
                f"remove it, or change parallel.zero."
            )


def _check_zero_section(section: Any, zero: int) -> None:
    where = "deepspeed.zero_optimization"
    if not isinstance(section, dict):
        raise UserError(f"{where}={section!r}: must be a mapping of keys.")
    prefix = "zero_optimization."
    refused = [k.removeprefix(prefix) for k in REFUSED if k.startswith(prefix)]
    _check_keys(section, where, ZERO_WORKS, refused, zero)
    for key, least in ZERO_SIZES.items():
        size = section.get(key, least)
        if type(size) not in (int, float) or size < least or not float(size).is_integer():
            raise UserError(f"{where}.{key}={size!r}: use a whole number of at least {least}.")
    if (size := section.get("allgather_bucket_size", 0)) % 2:
        raise UserError(f"{where}.allgather_bucket_size={size}: must be even; use {size + 1}.")
    offload = section.get("offload_param") or {}
    device = offload.get("device", "none") if isinstance(offload, dict) else offload
    if device not in ("none", "cpu"):
        raise UserError(f"{where}.offload_param.device={device!r}: use 'cpu'; remove the key.")


def _holds(section: dict[str, Any], dotted: str, even_off: bool = False) -> bool:
    """Whether the key is set, to anything but a plain 'off' unless `even_off`."""
    node: Any = section
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    off = {"enabled": False}
    return even_off or node is not False and node is not None and node != off
