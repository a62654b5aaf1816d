"""A stage that has begun goes on with the images that come next, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dino_scale.checkpoint.manifest import Manifest
from dino_scale.config.schema import ChainConfig, DataConfig, ScheduleConfig, StageConfig
from dino_scale.errors import ConfigError, RunFolderError
from launch.run_folder import RunFolder
from launch.same_samples import require_same_position
from tests.support.written_checkpoint import write_checkpoint

STAGE = StageConfig(schedule=ScheduleConfig(steps=5))
DECIDING = ["seed=1", "stages.first.data.order=windowed", "stages.first.batch.global_size=32"]
PLANNED = ["stages.first.batch.microbatch=4", "stages.first.augmentation.crop=0.25"]


def begun(path: Path, order: str = "permutation") -> RunFolder:
    """A run whose first stage has a checkpoint."""
    first = replace(STAGE, data=DataConfig(order=order))
    folder = RunFolder.create(path / "run", ChainConfig(name="test", stages={"first": first, "second": STAGE}))
    write_checkpoint(folder.path / "first" / "checkpoints" / "step_00000004")
    folder.record("first", "interrupted", 4, {}, 1.0)
    return folder


@pytest.mark.parametrize("change", DECIDING)
def test_what_decides_the_images_may_not_change(tmp_path: Path, change: str) -> None:
    folder = begun(tmp_path)
    with pytest.raises(RunFolderError, match=rf"{change.partition('=')[0]}: was .*, but stage first has begun"):
        RunFolder.open(folder.path, [change])


@pytest.mark.parametrize("change", PLANNED)
def test_in_planned_order_sizes_decide_too(tmp_path: Path, change: str) -> None:
    RunFolder.open(begun(tmp_path / "a").path, [change])
    folder = begun(tmp_path / "b", "size_planned")
    with pytest.raises(RunFolderError, match="stage first has begun: it would repeat or skip images"):
        RunFolder.open(folder.path, [change])


def test_before_the_first_checkpoint_and_in_later_stages_all_may_change(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    RunFolder.open(folder.path, ["stages.second.batch.global_size=32", "stages.second.data.order=windowed"])
    for file in (folder.path / "first" / "checkpoints" / "step_00000004").iterdir():
        file.unlink()
    (folder.path / "first" / "checkpoints" / "step_00000004").rmdir()
    for change in DECIDING:
        RunFolder.open(folder.path, [change])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 1}, "was written with seed 0 after 48 images in 4 steps; seed 1 and batch.global_size 12 would"),
        ({"global_size": 16}, "batch.global_size 16 would repeat or skip images"),
        ({"index_digest": "other"}, r"another packing of the data \(index none, this one has other\)"),
    ],
)
def test_a_checkpoint_of_other_samples_is_refused(tmp_path: Path, change: dict, expected: str) -> None:
    manifest: Manifest = write_checkpoint(tmp_path / "step_00000004")
    same = {"seed": 0, "index_digest": "none", "global_size": 12}
    require_same_position(tmp_path / "step_00000004", manifest, **same)
    with pytest.raises(ConfigError, match=expected):
        require_same_position(tmp_path / "step_00000004", manifest, **same | change)
