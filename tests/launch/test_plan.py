"""The plan agrees with what the parts really do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dino_scale.config.decode import load_chain
from dino_scale.config.schema import (
    BackboneConfig,
    BatchConfig,
    ChainConfig,
    DataConfig,
    LaunchConfig,
    ModelConfig,
    ScheduleConfig,
    StageConfig,
)
from dino_scale.errors import ConfigError
from dino_scale.model.dino import build_model
from launch.cli import main
from launch.commands.demo import CHAIN, with_data_in
from launch.plan import ModelSize, memory, model_size, plan_stages

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


def test_model_size_is_that_of_the_real_model() -> None:
    config = ModelConfig(
        backbone=BackboneConfig("resnet18", outputs=(2, 3)), hidden=32, heads=4, levels=3, feedforward=64, queries=10
    )
    model = build_model(config, 5)
    size = model_size(config, 5)
    assert size.trained + size.frozen == sum(parameter.numel() for parameter in model.parameters())
    assert size.frozen == sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad) > 0
    assert size.trained + size.frozen + size.buffers == sum(tensor.numel() for tensor in model.state_dict().values())


def test_memory_by_zero_stage() -> None:
    size = ModelSize(trained=1000, frozen=100, buffers=10)
    parts = [memory(size, stage, workers=4, average=True) for stage in range(4)]
    assert [part.parameters for part in parts] == [4440, 4440, 4440, 1140]
    assert [part.gradients for part in parts] == [4000, 4000, 1000, 1000]
    assert [part.optimizer for part in parts] == [8000, 3000, 3000, 3000]
    assert [part.average for part in parts] == [4000, 1000, 1000, 1000]
    assert memory(size, 1, workers=4, average=False).average == 0


def test_the_demo_trains_on_objects_first(tmp_path: Path) -> None:
    config = with_data_in(load_chain(CHAIN), tmp_path)
    trains = [Path(stage.data.train).relative_to(tmp_path) for stage in config.stages.values()]
    assert trains == [Path("objects/train"), *[Path("scenes/train")] * (len(trains) - 1)]
    assert len(trains) == 3


def test_plan_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CHAIN), "--set", "stages.pretrain.data.train=nowhere"]) == 0
    text = capsys.readouterr().out
    assert "stages.pretrain.data.train 'nowhere' does not exist yet: what depends on it is shown as ?" in text
    assert "(assumed: no data is there to count them)" in text
