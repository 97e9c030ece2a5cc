"""What the server of `forks` loads: all that a training imports until its first step."""

import pkgutil
from importlib import import_module

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import est_ds

for family in ("bert", "gpt2", "llama", "mamba", "mamba2", "t5"):
    import_module(f"transformers.models.{family}.modeling_{family}")
for module in pkgutil.walk_packages(est_ds.__path__, "est_ds."):
    if not module.name.startswith("est_ds.studies"):  # its libraries start threads
        import_module(module.name)
