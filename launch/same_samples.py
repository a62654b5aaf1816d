"""Which settings decide what a stage reads at every step, and so may not change once it has learned from some of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dino_scale.checkpoint.manifest import Manifest
from dino_scale.config.schema import ChainConfig
from dino_scale.errors import ConfigError, RunFolderError


def require_same_samples(
    run: Path, config: ChainConfig, unfinished: Iterable[str], changed: Mapping[str, tuple[Any, Any]]
) -> None:
    """RunFolderError where a stage of `unfinished` has a checkpoint and a change would skip or repeat its samples.

    changed: dotted key -> (value before, value after). The position in a stage's samples is a number, counted along an
    order that follows from these settings; with others it would point to a place that is not the one reached.
    """
    for name in unfinished:
        if not any((run / name / "checkpoints").glob("step_*")):
            continue
        for key, (old, new) in changed.items():
            if _decides_samples(key, name, config):
                raise RunFolderError(
                    f"{key}: was {old}, is {new}, but stage {name} has begun: it would repeat or skip images; leave it "
                    "as it was, or start a new run"
                )


def require_same_position(checkpoint: Path, manifest: Manifest, seed: int, index_digest: str, global_size: int) -> None:
    """ConfigError unless the next step after `manifest` reads what it would have read in the run that wrote it."""
    if manifest.index_digest != index_digest:
        raise ConfigError(
            f"{checkpoint}: was trained on another packing of the data (index {manifest.index_digest[:12]}, this one "
            f"has {index_digest[:12]}): resume with the shards it was started with"
        )
    if manifest.seed != seed or manifest.samples_seen != manifest.step * global_size:
        raise ConfigError(
            f"{checkpoint}: was written with seed {manifest.seed} after {manifest.samples_seen} images in "
            f"{manifest.step} steps; seed {seed} and batch.global_size {global_size} would repeat or skip images: "
            "resume with the settings it was started with"
        )


def _decides_samples(key: str, stage: str, config: ChainConfig) -> bool:
    prefix = f"stages.{stage}."
    if key in ("seed", f"{prefix}data.order", f"{prefix}batch.global_size"):
        return True
    planned = config.stages[stage].data.order == "size_planned"  # then sizes of a whole epoch decide who goes with whom
    return planned and (key == f"{prefix}batch.microbatch" or key.startswith(f"{prefix}augmentation."))
