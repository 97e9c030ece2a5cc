"""The engine that a run file asks for."""

from __future__ import annotations

from est_ds.design import Design
from est_ds.engine.base import Engine
from est_ds.ranks.world import World


def build_engine(design: Design, world: World) -> Engine:
    """A pipeline where `parallel.pipe` is above 1, otherwise plain ZeRO."""
    if design.config.parallel.pipe > 1:
        from est_ds.engine.pipeline import PipelineEngine

        return PipelineEngine(design, world)
    from est_ds.engine.zero import ZeroEngine

    return ZeroEngine(design, world)
