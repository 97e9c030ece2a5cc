"""What the server of `forks` loads: all that a training imports until its last step."""

import pkgutil
from importlib import import_module

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import est_ds

for family in ("bert", "gpt2", "llama", "mamba", "mamba2", "t5"):
    import_module(f"transformers.models.{family}.modeling_{family}")
for module in pkgutil.walk_packages(est_ds.__path__, "est_ds."):
    if not module.name.startswith("est_ds.studies"):  # its libraries start threads
        import_module(module.name)
# What DeepSpeed imports in its first step: the whole of torch's compiler, which takes as long as
# all the rest of a tiny training.
import_module("deepspeed.runtime.zero.muon.muon_optimizer")
import_module("deepspeed.runtime.superoffload.superoffload_stage3")
import_module("deepspeed.moe.ep_router")
import_module("deepspeed.ops.triton_ops")
import_module("deepspeed.comm.mori")
import_module("torch.utils.tensorboard")
import_module("torch.profiler._cupti_monitor")
import_module("deepspeed.module_inject.auto_ep_layer")
import_module("tensorboard.plugins.projector.projector_plugin")
