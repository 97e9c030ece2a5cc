"""What est_ds changes of DeepSpeed's insides, each with its reason, and what it leans on.

The pin of DeepSpeed will move: this is what breaks then. `INSIDES` names every method, attribute
and table that is no public interface; a test looks for each in the installed version.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch import nn

from est_ds.engine.reduction import sum_of_squares

ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
PIPE_ENGINE = "deepspeed.runtime.pipe.engine.PipelineEngine"
PIPELINE = "deepspeed.runtime.pipe.module.PipelineModule"
ZERO_1_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
ZERO_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
WRITER = "tensorboard.summary.writer.event_file_writer._AsyncWriterThread"
FLAT_GRADIENTS = "deepspeed.runtime.zero.stage_1_and_2.GradPartitionBufferGroup"
MUON = "deepspeed.runtime.zero.muon.original_muon"
FRAGMENT = "deepspeed.utils.tensor_fragment.tensor_fragment"
LINKAGE = "deepspeed.utils.mixed_precision_linkage"
COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator"


@dataclass(frozen=True)
class Inside:
    """A name of DeepSpeed's that is no public interface.

    Attributes:
        owner: the class, or the module, that has it.
        parameters: of a method, less self; None: an attribute that the class sets, or holds.
        used: where here, and what for.
    """

    owner: str
    name: str
    parameters: tuple[str, ...] | None
    used: str


INSIDES = (
    Inside(ENGINE, "_do_optimizer_sanity_check", ("basic_optimizer",), "patches: ZeRO for bf16"),
    Inside(ENGINE, "clip_fp32_gradients", (), "patches: clipping without ZeRO"),
    Inside(ENGINE, "_global_grad_norm", None, "patches: the norm that is reported without ZeRO"),
    Inside(ENGINE, "allreduce_gradients", None, "patches: gradients reduced alike"),
    Inside(ENGINE, "global_steps", None, "base: set when a run resumes"),
    Inside(ENGINE, "global_samples", None, "base: set when a run resumes"),
    Inside(ENGINE, "micro_steps", None, "base: set when a run resumes"),
    Inside("deepspeed.utils.groups", "mpu", None, "patches: several engines in one process"),
    Inside("deepspeed.comm.torch", "build_shm_op", (), "patches: nothing is compiled at start"),
    Inside("deepspeed.runtime.compiler", "compile", (), "patches: no compiler is loaded"),
    Inside(WRITER, "run", (), "patches: errors of the disk are said once"),
    Inside(WRITER, "exception", None, "patches: errors of the disk are said once"),
    Inside(PIPE_ENGINE, "_INSTRUCTION_MAP", None, "patches: passes timed, tied gradients summed"),
    Inside(PIPE_ENGINE, "pipe_buffers", None, "pipeline: labels for the head"),
    Inside(PIPELINE, "_partition_layers", ("method",), "pipeline: cut at given places"),
    Inside(PIPELINE, "_set_bounds", ("start", "stop"), "pipeline: cut at given places"),
    Inside(PIPELINE, "parts", None, "pipeline: cut at given places"),
    Inside(PIPELINE, "stage_id", None, "pipeline: cut at given places"),
    Inside(PIPELINE, "stage_owner", ("layer_idx",), "pipeline: which stages hold a tied parameter"),
    Inside(PIPELINE, "_grid", None, "pipeline: processes of a tied parameter"),
    Inside(PIPELINE, "forward_funcs", None, "pipeline: the pieces of this stage"),
    Inside(ZERO_1_2, "get_param_gradient_attribute", ("param",), "ties: accumulated gradients"),
    Inside(ZERO_1_2, "bit16_groups", None, "patches: gradients reduced alike"),
    Inside(ZERO_1_2, "get_gradient_for_reduction", ("param",), "patches: the same"),
    Inside(ZERO_1_2, "process_gradients", ("param", "i"), "patches: the same"),
    Inside(ZERO_1_2, "single_partition_of_fp32_groups", None, "fragments: weights and moments"),
    Inside(ZERO_1_2, "update_lp_params", (), "fragments: weights that were written are used"),
    Inside(ZERO_1_2, "reduce_gradients", ("pipeline_parallel",), "reduction: replaced"),
    Inside(ZERO_1_2, "check_overflow", ("partition_gradients",), "reduction: replaced"),
    Inside(
        ZERO_1_2,
        "get_grad_norm_direct",
        ("gradients", "params", "norm_type"),
        "reduction: replaced",
    ),
    Inside(ZERO_1_2, "_model_parallel_all_reduce", ("tensor", "op"), "reduction: norms"),
    Inside(ZERO_1_2, "averaged_gradients", None, "reduction: what the step reads"),
    Inside(ZERO_1_2, "clear_grad_attribute", ("param",), "reduction: gradients that were copied"),
    Inside(ZERO_1_2, "reduce_bucket_size", None, "reduction: how much is reduced at once"),
    Inside(ZERO_1_2, "parallel_partitioned_bit16_groups", None, "reduction: stepped in place"),
    Inside(ZERO_1_2, "real_dp_process_group", None, "reduction: stepped in place"),
    Inside(FLAT_GRADIENTS, "flat_partition", None, "reduction: what the step reads"),
    Inside(ZERO_1_2, "norm_for_param_grads", None, "patches: stale norms"),
    Inside(LINKAGE, "_hp_mapping", None, "fragments: where a parameter lies"),
    Inside(FRAGMENT, "hp_fragment", None, "reduction: stepped in place"),
    Inside(FRAGMENT, "hp_fragment_address", None, "fragments: where a parameter lies"),
    Inside(FRAGMENT, "lp_fragment_address", None, "fragments: where a parameter lies"),
    Inside(FRAGMENT, "param_group_index", None, "fragments: where a parameter lies"),
    Inside(ZERO_3, "grad_position", None, "fragments: where a parameter lies"),
    Inside(ZERO_3, "get_param_id", ("param",), "fragments: where a parameter lies"),
    Inside(ZERO_3, "fp32_partitioned_groups_flat", None, "fragments: weights and moments"),
    Inside(ZERO_3, "_partition_all_parameters", None, "fragments: written weights are used"),
    Inside(ZERO_3, "_reassign_or_swap_out_partitioned_parameters", None, "fragments: the same"),
    Inside(ZERO_3, "persistent_parameters", None, "fragments: written weights are used"),
    Inside(ZERO_3, "norm_for_param_grads", None, "patches: stale norms"),
    Inside(ZERO_3, "grad_partitions_flat_buffer", None, "patches: stale gradients"),
    Inside(ZERO_3, "parameter_offload", None, "patches: the order of gathering is forgotten"),
    Inside(COORDINATOR, "_invalidate_trace", (), "patches: the order of gathering is forgotten"),
    Inside(COORDINATOR, "is_invalid_trace", (), "patches: the order of gathering is forgotten"),
)


def compile_nothing_at_start() -> None:
    """Leaves out DeepSpeed's shared-memory reduction on CPUs: it compiles C++ for a minute at the
    first start, and hangs every later start if that is interrupted."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # `deepspeed.comm` has an attribute of that name, which is torch.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def load_no_compiler() -> None:
    """Loads DeepSpeed's Muon, which ZeRO imports in its first step whatever the optimizer, without
    the compilation that its functions ask for: that loads torch's compiler, two seconds of a
    processor and 120 MB in every process. `compile` in a run file loads it as ever."""
    from deepspeed.runtime import compiler

    kept, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module(MUON)
    finally:
        compiler.compile = kept


def forget_former_pipeline() -> None:
    """Lets a plain engine start after a pipeline's in one process: it would take the pipeline's
    groups of processes for its own."""
    from deepspeed.utils import groups

    groups.mpu = None


def keep_errors_of_tensorboard() -> None:
    """Keeps TensorBoard's writing threads from printing an error of the disk, which they raise
    again where the next figures come. Errors of all other threads, the watchdog's too, are still
    said."""
    run = _AsyncWriterThread.run
    if run.__module__ == __name__:
        return  # it has been done

    def quiet_run(thread: _AsyncWriterThread) -> None:
        try:
            run(thread)
        except OSError:
            pass  # `thread.exception` holds it

    _AsyncWriterThread.run = quiet_run


@contextmanager
def zero_optimizer_for_bf16() -> Iterator[None]:
    """Has engines that start within take DeepSpeed's ZeRO optimizer.

    For bf16 and ZeRO 1 DeepSpeed would take its BF16_Optimizer, which reduces the gradients of
    skipped layers too and fails where a pipe stage skips all its layers. Its ZeRO optimizer does
    the same with fp32 accumulation, without either.
    """
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

    former = DeepSpeedEngine._do_optimizer_sanity_check
    DeepSpeedEngine._do_optimizer_sanity_check = lambda *_: ZERO_OPTIMIZATION
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = former


def clip_over_stages(engine: Any, group: Any | None) -> None:
    """Replaces DeepSpeed's clipping without ZeRO, which clips every pipe stage by its own norm,
    does not say the norm, and steps whatever it is.

    Args:
        group: the processes that hold the pipe stages of this replica; None: this one alone.
    """
    engine.clip_fp32_gradients = lambda: None
    engine.optimizer.step = partial(_clipped_step, engine, group, engine.optimizer.step)


def _clipped_step(engine: Any, group: Any | None, step: Callable[[], None]) -> None:
    gradients = [
        p.grad
        for p in engine.module.parameters()
        if p.grad is not None and not getattr(p, "ds_pipe_replicated", False)
    ]
    squares = sum_of_squares(gradients, engine.device)
    if group is not None:
        dist.all_reduce(squares, group=group)
    norm = engine._global_grad_norm = squares.sqrt().float()
    if not norm.isfinite():
        return
    if limit := engine.gradient_clipping():
        torch.nn.utils.clip_grads_with_norm_(engine.module.parameters(), limit, norm)
    step()


def replace_instructions(engine: Any, by_kind: dict[type, Callable[..., None]]) -> None:
    """Has a pipeline engine carry out some kinds of its instructions otherwise."""
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **by_kind}


def reduce_alike(engine: Any, idle: Callable[[], Iterable[nn.Parameter]]) -> None:
    """Has all replicas reduce the same gradients in the same order under ZeRO 1 and 2, whatever
    their own micro-batches use: DeepSpeed reduces what it finds, in the order in which it came, and
    would add up gradients of different parameters.

    Under ZeRO 2 a backward then keeps all its gradients to its end.

    Args:
        idle: parameters that no micro-batch of the step uses, on any replica.
    """
    optimizer = engine.optimizer
    reduce, process = engine.allreduce_gradients, optimizer.process_gradients
    of_each_backward = optimizer.partition_gradients
    if of_each_backward:
        optimizer.process_gradients = lambda *_: None  # where a gradient comes

    def reduce_union(*arguments: Any, **named: Any) -> None:
        if of_each_backward or engine.is_gradient_accumulation_boundary():
            left_out = {id(parameter) for parameter in idle()}
            for i, group in enumerate(optimizer.bit16_groups):
                for parameter in (p for p in group if id(p) not in left_out):
                    accumulated = optimizer.get_gradient_for_reduction(parameter)
                    if parameter.grad is None and accumulated is None:
                        parameter.grad = torch.zeros_like(parameter)
                    process(parameter, i)
        reduce(*arguments, **named)

    engine.allreduce_gradients = reduce_union


def gather_whole(layers: Iterable[nn.Module]) -> None:
    """Has ZeRO 3 gather each layer at once and reduce all its gradients, also where it is skipped:
    replicas that skip others would wait for each other. To be called before the engine starts."""
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers:
        set_z3_leaf_module(layer, True)


def forget_order(optimizer: Any) -> None:
    """Lets ZeRO 3 forget in what order it gathered parameters: where other layers run than before
    it would gather skipped ones too, until it noticed."""
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def forget_gradients(optimizer: Any, zero: int, offload: bool) -> None:
    """Zeroes what DeepSpeed's ZeRO optimizer keeps of its gradients after a step: the last gradient
    that a parameter had would be applied again at every step that skips it."""
    if offload:
        groups = (
            optimizer.fp32_partitioned_groups_flat
            if zero == 3
            else optimizer.single_partition_of_fp32_groups
        )
        for group in groups:
            group.grad.zero_()
        optimizer.norm_for_param_grads.clear()
    if zero == 3:
        optimizer.grad_partitions_flat_buffer.zero_()
