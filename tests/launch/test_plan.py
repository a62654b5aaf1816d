"""The plan agrees with what the parts really do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dino_scale.config.decode import load_chain
from dino_scale.config.schema import (
    AugmentationConfig,
    BatchConfig,
    ChainConfig,
    DataConfig,
    LaunchConfig,
    ScheduleConfig,
    StageConfig,
)
from dino_scale.errors import ConfigError
from launch.cli import main
from launch.commands.demo import CHAIN, with_data_in
from launch.plan import largest_image, plan_stages, possible_microbatches

STAGE = StageConfig(schedule=ScheduleConfig(epochs=3), batch=BatchConfig(global_size=8, microbatch=2))


def chain(stage: StageConfig, workers: int = 2) -> ChainConfig:
    return ChainConfig(stages={"only": stage}, launch=LaunchConfig(workers=workers))


def test_steps_follow_from_the_data(tiny_data: Path) -> None:
    folder = tiny_data / "objects"
    data = DataConfig(train=str(folder / "train"), validation=str(folder / "validation"))
    (plan,) = plan_stages(chain(replace(STAGE, data=data)))
    assert (plan.train.images, plan.train.shards, plan.validation and plan.validation.images) == (16, 1, 4)
    assert (plan.steps, plan.epochs, plan.accumulation, plan.microbatch, plan.workers) == (6, 3.0, 2, 2, 2)


def test_data_may_not_be_there_yet() -> None:
    (plan,) = plan_stages(chain(replace(STAGE, data=DataConfig(train="nowhere"))))
    assert (plan.steps, plan.epochs, plan.train.images) == (None, 3.0, None)
    (plan,) = plan_stages(chain(replace(STAGE, schedule=ScheduleConfig(steps=7))))
    assert (plan.steps, plan.epochs) == (7, None)


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"stages\.only\.batch\.global_size is 8"):
        plan_stages(chain(STAGE, workers=3))


def test_the_demo_trains_on_objects_first(tmp_path: Path) -> None:
    config = with_data_in(load_chain(CHAIN), tmp_path)
    trains = [Path(stage.data.train).relative_to(tmp_path) for stage in config.stages.values()]
    assert trains == [Path("objects/train"), *[Path("scenes/train")] * (len(trains) - 1)]
    assert len(trains) == 3


def test_images_may_be_stated() -> None:
    (plan,) = plan_stages(chain(replace(STAGE, data=DataConfig(train="nowhere"))), {"only": 80})
    assert (plan.steps, plan.epochs, plan.train.images, plan.train.shards) == (30, 3.0, 80, None)


def test_largest_image() -> None:
    stage = replace(STAGE, augmentation=AugmentationConfig(scales=(480, 800), max_size=1333))
    assert [largest_image(stage, microbatch) for microbatch in (1, 2)] == [(800, 1333), (1333, 1333)]
    padded = replace(stage, data=DataConfig(pad_multiple=32))
    assert largest_image(padded, 1) == (800, 1344)


def test_possible_microbatches() -> None:
    assert possible_microbatches(16, 4) == [1, 2, 4]
    assert possible_microbatches(24, 2) == [1, 2, 4]
    assert possible_microbatches(64, 64) == [1]


def test_plan_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(f'{{"images_per_second": {rate}, "world_size": 4}}\n' for rate in (1, 20, 24, 28)))
    options = [
        "--images",
        "pretrain=1600",
        "--images-per-second",
        str(log),
        "--price-per-hour",
        "3",
        "--gpu-memory",
        "1",
    ]
    assert main(["plan", str(CHAIN), "--set", "stages.pretrain.data.train=nowhere", *options]) == 0
    text = capsys.readouterr().out
    assert "stages.finetune.data.train 'scenes/train' does not exist yet: what depends on it is shown as ?" in text
    assert "(assumed: no data is there to count them)" in text
    assert "at 12.0 images/s of 2 worker(s)" in text  # 24 of 4 workers, the first line being slow by nature
    hours = 1350 * 16 / 12 / 3600
    assert f"{hours:.2f} " in text and f"{hours * 2 * 3:.2f} " in text
    assert "for 1 GB, of which 0.9 are taken to be usable: ZeRO 0, microbatch 8, which needs 0." in text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--images-per-second", "-1"], "--images-per-second is -1: expected a number above 0"),
        (["--images-per-second", "none.jsonl"], "'none.jsonl': expected a number, or the metrics.jsonl of a stage"),
        (["--images", "train=5"], "--images train=N: expected one of the stages pretrain, finetune, scratch"),
    ],
)
def test_plan_refuses(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CHAIN), *option]) == 2
    assert message in capsys.readouterr().err
