"""Choosing the engine that a configuration names; only that one is imported."""

from __future__ import annotations

from dino_scale.config.schema import LaunchConfig
from launch.engine import Engine


def open_engine(launch: LaunchConfig) -> Engine:
    """The engine that the configuration names; enter it before use."""
    if launch.engine == "local":
        from launch.local_engine import LocalEngine

        return LocalEngine()
    if launch.engine == "torchrun":
        from launch.torchrun_engine import TorchrunEngine

        return TorchrunEngine()
    from launch.ray_engine import RayEngine

    return RayEngine(launch)
