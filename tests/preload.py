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
# What else a training imports before its end.
for name in (
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.ep_router",
    "deepspeed.ops.triton_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "tensorboard.plugins.projector.projector_plugin",
    "torch._dynamo",
    "torch.profiler._cupti_monitor",
    "torch.utils.tensorboard",
):
    import_module(name)
