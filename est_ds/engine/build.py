"""The engine that a run file asks for."""

from __future__ import annotations

from typing import Any

from est_ds.config import RunConfig
from est_ds.engine.base import Engine
from est_ds.plans.methods.base import Method
from est_ds.runtime import World
from est_ds.slicing.families.base import Family


def build_engine(
    config: RunConfig,
    hf_config: Any,
    family: Family,
    method: Method,
    cuts: list[int],
    world: World,
    tensorboard_dir: str,
) -> Engine:
    """A pipeline where `parallel.pipe` is above 1, otherwise plain ZeRO.

    Args:
        cuts: ends of the layer ranges of the pipe stages.
    """
    if config.parallel.pipe > 1:
        from est_ds.engine.pipeline import PipelineEngine

        return PipelineEngine(
            config, hf_config, family, method.shape, cuts, world, tensorboard_dir
        )
    from est_ds.engine.zero import ZeroEngine

    return ZeroEngine(config, hf_config, family, method.shape, world, tensorboard_dir)
