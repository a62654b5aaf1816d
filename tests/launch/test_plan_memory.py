"""State and messages of the plan against those of real DeepSpeed engines; what is made of them."""

from __future__ import annotations

import pytest

from dino_scale.config.schema import BackboneConfig, ModelConfig, OptimizerConfig
from dino_scale.errors import ConfigError
from dino_scale.model.dino import build_model
from launch.plan_cost import Reading, duration, reading, traffic
from launch.plan_memory import Memory, ModelSize, memory, model_size, recommend
from tests.support.memory_of_engines import MODEL, OPTIMIZER, every_stage
from tests.support.partitions import pieces
from tests.support.processes import run_ranks
from tests.support.tiny_detector import CLASSES

WORKERS, ACCUMULATION = 2, 3
SCALARS = 1000  # bytes of step counts and the like, which the plan leaves out


def test_state_and_messages_are_those_of_real_engines() -> None:
    size = model_size(MODEL, CLASSES, OPTIMIZER)
    assert len(size.groups) > 2 and size.frozen and size.trained > 10**6
    ranks = run_ranks(every_stage, WORKERS, ACCUMULATION)
    for stage in range(4):
        planned = memory(size, stage, WORKERS, average=True, precision="fp32", device="cpu")
        for results in ranks:
            assert 0 <= results[stage][0] - planned.state < SCALARS, (stage, results[stage][0], planned)
        for rank, results in enumerate(ranks):
            assert results[stage][2] == pieces(size, stage, rank, WORKERS)
        expected, sent = traffic(size, stage, WORKERS, ACCUMULATION, "fp32"), ranks[0][stage][1]
        found = [sent.get(name, 0) for name in ("allreduce_", "_reduce_scatter_base_", "_allgather_base_")]
        for planned_bytes, real in zip((expected.reduced, expected.scattered, expected.gathered), found, strict=True):
            assert 0 <= real - planned_bytes < SCALARS, (stage, expected, sent)


def test_model_size_is_that_of_the_real_model() -> None:
    config = ModelConfig(
        backbone=BackboneConfig("resnet18", outputs=(2, 3)), hidden=32, heads=4, levels=3, feedforward=64, queries=10
    )
    model = build_model(config, 5)
    size = model_size(config, 5, OptimizerConfig())
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert sum(size.frozen) == frozen > 0
    assert size.buffers == sum(buffer.nbytes for buffer in model.buffers()) > 0


def test_memory_by_zero_stage() -> None:
    size = ModelSize(groups=((700, 301), (1000,)), frozen=(100,), buffers=40)
    parts = [memory(size, stage, workers=4, average=True) for stage in range(4)]
    # Groups are padded to multiples of 2 x 4 elements, 1008 and 1000; stage 3 pads every parameter to a multiple of 4.
    assert [part.parameters for part in parts] == [8444, 8472, 8472, 4 * (175 + 76 + 250 + 25 + 2101) + 40]
    assert [part.gradients for part in parts] == [8004, 8004, 2008, 2004]
    assert [part.optimizer for part in parts] == [16008, 6024, 6024, 6012]
    assert [part.average for part in parts] == [8004, 2008, 2008, 2004]
    assert memory(size, 1, workers=4, average=False).average == 0
    half = memory(size, 1, workers=4, average=True, precision="bf16_parameters")
    assert (half.parameters, half.gradients, half.optimizer) == (4256, 4002, 6024)
    with pytest.raises(ConfigError, match="precision 'fp8'"):
        memory(size, 1, workers=4, average=True, precision="fp8")


def test_what_comes_and_goes_counts_at_its_highest() -> None:
    need = Memory(1, parameters=10, gradients=5, optimizer=20, average=0, gathered=0, bucket=3, update=30)
    assert need.state == 30
    assert need.total == 35 + 30  # the update, while activations are few
    assert need.with_activations(100).total == 35 + 103


def test_recommendation() -> None:
    def need(stage: int, microbatch: int) -> Memory:
        return Memory(stage, 100 - 20 * stage, 0, 0, 0, 0, 0, 0, activations=50 * microbatch)

    def sent(stage: int, microbatch: int) -> int:
        return 10 + stage

    choice = recommend(190, [1, 2, 4], need, sent)
    assert choice is not None and (choice.zero_stage, choice.microbatch) == (1, 2)
    choice = recommend(199, [1, 2], lambda *_: need(0, 1), lambda stage, _: 10 - stage)
    assert choice is not None and (choice.zero_stage, choice.microbatch) == (3, 2)
    assert recommend(89, [1, 2, 4], need, sent) is None


def test_ring_traffic() -> None:
    size = ModelSize(groups=((1000,),), frozen=(50,), buffers=0)
    sent = [traffic(size, stage, 4, 2, "bf16").sent(4) for stage in range(4)]
    # all-reduce: 2 x 3/4 of 4000 bytes; twice under stage 2; stages 1 and 2 gather 3/4 of 4000; stage 3 scatters twice
    assert sent == [6000, 9000, 15000, 6000 + 3150]
    assert traffic(size, 3, 1, 2, "bf16").sent(1) == 0


def test_reading() -> None:
    assert reading(1000, 8000, 10, 1) == Reading(1000, 8000, 10)
    part = reading(1000, 8000, 500, 8)
    assert (part.images, part.bytes) == (125, 1000)
    assert part.shards == round(500 * (1 - (7 / 8) ** 2))  # two images a shard: neither need be this node's


def test_duration_and_cost() -> None:
    took = duration(3600, 16, 32.0, 8, 2.5)
    assert (took.hours, took.worker_hours, took.cost) == (0.5, 4.0, 10.0)
    assert duration(1, 1, 1.0, 1, None).cost is None
