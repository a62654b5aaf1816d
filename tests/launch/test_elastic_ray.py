"""Losing and gaining machines on a cluster of several Ray nodes: the stage goes on, and nothing is learned twice."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dino_scale.config.decode import load_chain
from dino_scale.config.schema import (
    ChainConfig,
    CheckpointConfig,
    LaunchConfig,
    ScheduleConfig,
    WorkerRange,
)
from dino_scale.errors import UserError, WorkerLostError
from dino_scale.training.control import Event, MessageEvent, StepEvent
from launch.ray_engine import RayEngine
from launch.signals import StopRequest
from launch.worker import StageJob, StageResult
from tests.support.fake_cluster import FakeCluster, fake_cluster
from tests.support.sample_ids import assert_each_image_once_per_epoch

CHAIN = """
model: {{extends: {configs}/model/small.yaml, hidden: 32, heads: 2, feedforward: 32}}
stages:
  only:
    extends: {configs}/stage/small_images.yaml
    data: {{train: {shards}, log_samples: true}}
    batch: {{global_size: 4, microbatch: 2}}
    schedule: {{steps: 40}}
    checkpoint: {{every_steps: 4}}
    log_every_steps: 1
    precision: fp32
"""
CONFIGS = Path(__file__).parents[2] / "configs"
STEPS, FAULT_STEP = 40, 7  # a checkpoint every 4 steps


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    with fake_cluster(nodes=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> ChainConfig:
    path = tmp_path_factory.mktemp("chain") / "chain.yaml"
    path.write_text(CHAIN.format(configs=CONFIGS, shards=tiny_data / "objects" / "train"))
    return load_chain(path)


@dataclass
class Observer:
    """Sees the events of a run; calls `act` with every step, once it has done so for the first time at `at`."""

    at: int
    act: Callable[[], None]
    steps: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    acted: float | None = None
    first_new_step: float | None = None  # seconds after the fault

    def __call__(self, event: Event) -> None:
        if isinstance(event, MessageEvent):
            self.messages.append(event.text)
        if not isinstance(event, StepEvent):
            return
        again = bool(self.steps) and self._restarted()
        self.steps.append(event.step)
        if self.acted is not None and self.first_new_step is None and again:
            self.first_new_step = time.monotonic() - self.acted
        if self.acted is None and event.step >= self.at:
            self.acted = time.monotonic()
            self.act()

    def _restarted(self) -> bool:
        """Whether the last thing said before this step was said by workers that had begun anew."""
        return self.acted is not None and any("continues from" in text for text in self.messages[-3:])


def nothing() -> None:
    """No fault."""


def launch(cluster: FakeCluster, low: int, high: int, retries: int = 3) -> LaunchConfig:
    return LaunchConfig(workers=WorkerRange(low, high), address=cluster.address, retries=retries)


def run(engine: RayEngine, config: ChainConfig, folder: Path, see: Callable[[Event], None]) -> StageResult:
    return engine.run(StageJob(str(folder), "only", config), StopRequest(), see)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "only" / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "only" / "weights.safetensors")


def assert_each_step_once(folder: Path, config: ChainConfig, steps: int) -> None:
    """The log holds every step once, and every step trained on the images that the order gives it."""
    assert [(line["step"], line["samples_seen"]) for line in lines(folder)] == [(n, 4 * n) for n in range(1, steps + 1)]
    shards = Path(config.stages["only"].data.train)
    assert_each_image_once_per_epoch(folder / "only", shards, config.seed, 4, steps)


@pytest.fixture(scope="module")
def engine(cluster: FakeCluster) -> Iterator[RayEngine]:
    """One for all, so that every test finds two workers already there: starting them takes longer than training."""
    with RayEngine(launch(cluster, 1, 2)) as engine:
        yield engine


@pytest.fixture(scope="module")
def undisturbed(engine: RayEngine, config: ChainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two workers on two nodes that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(engine, config, folder, Observer(STEPS + 1, nothing)) == StageResult(STEPS)
    assert len({worker.machine.node for worker in engine._team}) == 2
    assert [worker.place.local_rank for worker in engine._team] == [0, 0]
    assert_each_step_once(folder, config, STEPS)
    return folder


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(
    engine: RayEngine, config: ChainConfig, undisturbed: Path, tmp_path: Path, record_property: Callable
) -> None:
    see = Observer(FAULT_STEP, lambda: os.kill(engine._team[1].pid, signal.SIGKILL))
    assert run(engine, config, tmp_path, see) == StageResult(STEPS)
    record_property("worker killed, seconds", see.first_new_step)
    assert sum("died" in text and "starting again" in text for text in see.messages) == 1
    assert {line["world_size"] for line in lines(tmp_path)} == {2}
    assert_each_step_once(tmp_path, config, STEPS)
    one, other = weights(tmp_path), weights(undisturbed)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].numpy().tobytes() != other[name].numpy().tobytes()] == []


@pytest.mark.slow
def test_too_many_failures_stop_the_run(cluster: FakeCluster, config: ChainConfig, tmp_path: Path) -> None:
    never = replace(config.stages["only"], checkpoint=CheckpointConfig(every_steps=0))  # steps outrun this observer
    with RayEngine(launch(cluster, 2, 2, retries=1)) as engine:
        killed = []

        def kill(event: Event) -> None:
            team = engine._team  # empty between two generations, when steps of the last one may still be told
            if isinstance(event, StepEvent) and team and team[0].pid not in killed:
                killed.append(team[0].pid)
                os.kill(killed[-1], signal.SIGKILL)

        with pytest.raises(WorkerLostError, match=r"died .*failed 2 times in a row before the first checkpoint"):
            run(engine, replace(config, stages={"only": never}), tmp_path, kill)
    assert len(set(killed)) == 2


def test_a_lost_machine_shrinks_the_run_and_a_new_one_grows_it(
    cluster: FakeCluster,
    engine: RayEngine,
    config: ChainConfig,
    undisturbed: Path,
    tmp_path: Path,
    record_property: Callable,
) -> None:
    lose = Observer(FAULT_STEP, cluster.kill)
    assert run(engine, config, tmp_path / "shrunk", lose) == StageResult(STEPS)
    _went_on_with_one_worker(tmp_path / "shrunk", config, undisturbed)
    record_property("Ray node lost, seconds", lose.first_new_step)
    gain = Observer(3, cluster.add)
    _grows(engine, config, tmp_path / "grown", gain)
    record_property("Ray node added, seconds", gain.first_new_step)


def _went_on_with_one_worker(folder: Path, config: ChainConfig, undisturbed: Path) -> None:
    """The same trajectory, up to the order in which numbers are added up."""
    assert_each_step_once(folder, config, STEPS)
    found, expected = lines(folder), lines(undisturbed)
    worlds = [line["world_size"] for line in found]
    assert worlds == sorted(worlds, reverse=True) and set(worlds) == {1, 2}
    assert worlds.count(2) % 4 == 0, "it did not continue from a checkpoint"
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-3)
    one, other = weights(folder), weights(undisturbed)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


def _grows(engine: RayEngine, config: ChainConfig, folder: Path, gain: Observer) -> None:
    """No step is done twice: the run saves before it grows."""
    endless = replace(config.stages["only"], schedule=ScheduleConfig(steps=100000))
    stop = StopRequest()

    def see(event: Event) -> None:
        gain(event)
        stop.requested = len(engine._team) == 2 and isinstance(event, StepEvent) and bool(gain.first_new_step)

    job = StageJob(str(folder), "only", replace(config, stages={"only": endless}))
    result = engine.run(job, stop, see)
    assert result.interrupted
    assert gain.steps == list(range(1, result.step + 1))
    assert_each_step_once(folder, config, result.step)
    worlds = [line["world_size"] for line in lines(folder)]
    assert worlds == sorted(worlds) and set(worlds) == {1, 2}
    assert any("because there is room for 2 workers now" in text for text in gain.messages)


def test_what_fits_into_no_worker_is_refused(engine: RayEngine, config: ChainConfig, tmp_path: Path) -> None:
    """A cluster's workers say what memory they have, the driver compares; its own is of no interest."""
    sizes = replace(config.stages["only"].augmentation, scales=(30000,), max_size=30000)
    huge = replace(config, stages={"huge": replace(config.stages["only"], augmentation=sizes)})
    expected = r"stages\.huge needs about .* free memory for 1 worker\(s\) on this machine \(worker . on 127\.0\.0\.1\)"
    with pytest.raises(UserError, match=expected):
        engine.run(StageJob(str(tmp_path), "huge", huge), StopRequest(), Observer(1, nothing))
    assert not (tmp_path / "huge").exists()
