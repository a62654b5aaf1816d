"""Ray on this machine with two real workers: results, errors, stops and deaths travel back as they should."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from dino_scale.config.decode import load_chain
from dino_scale.config.schema import ChainConfig, DataConfig, LaunchConfig
from dino_scale.errors import DataError, WorkerLostError, WorkerMemoryError
from dino_scale.training.control import Event, MessageEvent, StepEvent
from launch.ray_engine import RayEngine
from launch.signals import StopRequest
from launch.worker import StageJob

CHAIN = """
model: {extends: MODEL}
launch: {workers: 2}
stages:
  only:
    extends: STAGE
    batch: {global_size: 4, microbatch: 2}
    schedule: {steps: 100000}
    log_every_steps: 1
    precision: fp32
"""
CONFIGS = Path(__file__).parents[2] / "configs"
ADVICE = r"lower stages\.only\.batch\.microbatch \(now 2\), or .* dino-scale resume .* --set KEY=VALUE"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> ChainConfig:
    path = tmp_path_factory.mktemp("chain") / "chain.yaml"
    text = CHAIN.replace("MODEL", str(CONFIGS / "model" / "small.yaml"))
    path.write_text(text.replace("STAGE", str(CONFIGS / "stage" / "small_images.yaml")))
    return load_chain(path, [f"stages.only.data.train={tiny_data / 'objects' / 'train'}"])


@pytest.fixture(scope="module")
def engine() -> Iterator[RayEngine]:
    with RayEngine(LaunchConfig(workers=2, retries=0)) as engine:
        yield engine


def ignore(_: Event) -> None:
    """For runs whose events do not matter."""


def job(config: ChainConfig, folder: Path) -> StageJob:
    return StageJob(str(folder), "only", config)


def test_the_life_of_two_workers(engine: RayEngine, config: ChainConfig, tmp_path: Path) -> None:
    """In one test, because starting Ray takes longer than all the rest: errors, a stop, a continuation, a death."""
    _error_of_a_worker_keeps_its_class_and_message(engine, config, tmp_path / "error")
    _want_of_memory_names_what_to_change(engine, config, tmp_path / "memory")
    step = _stop_leaves_a_checkpoint_to_continue_from(engine, config, tmp_path / "run")
    _listens_on_loopback_only()
    _killed_worker_is_named(engine, config, tmp_path / "run", step)


def _error_of_a_worker_keeps_its_class_and_message(engine: RayEngine, config: ChainConfig, folder: Path) -> None:
    stage = replace(config.stages["only"], data=DataConfig(train=str(folder / "nowhere")))
    with pytest.raises(DataError, match=r"nowhere/manifest\.json: cannot be read") as caught:
        engine.run(job(replace(config, stages={"only": stage}), folder), StopRequest(), ignore)
    assert type(caught.value) is DataError


def _want_of_memory_names_what_to_change(engine: RayEngine, config: ChainConfig, folder: Path) -> None:
    """A layer that fits into no address space; nothing is tried again."""
    said: list[Event] = []
    huge = replace(config, model=replace(config.model, feedforward=10**12))
    with pytest.raises(WorkerMemoryError, match=ADVICE):
        engine.run(job(huge, folder), StopRequest(), said.append)
    assert not any("starting again" in event.text for event in said if isinstance(event, MessageEvent))


def _stop_leaves_a_checkpoint_to_continue_from(engine: RayEngine, config: ChainConfig, folder: Path) -> int:
    stop, steps = StopRequest(), []

    def stop_after_two(event: Event) -> None:
        if isinstance(event, StepEvent):
            steps.append(event.step)
            stop.requested = event.step >= 2

    result = engine.run(job(config, folder), stop, stop_after_two)
    assert result.interrupted and result.step >= 2
    assert steps == list(range(1, result.step + 1))
    assert (folder / "only" / "checkpoints" / f"step_{result.step:08d}" / "manifest.json").is_file()
    return result.step


def _killed_worker_is_named(engine: RayEngine, config: ChainConfig, folder: Path, step: int) -> None:
    victim = engine._team[1].pid
    seen: list[Event] = []

    def kill_at_first_step(event: Event) -> None:
        seen.append(event)
        if isinstance(event, StepEvent) and psutil.pid_exists(victim):
            os.kill(victim, signal.SIGKILL)

    with pytest.raises(
        WorkerLostError, match=r"worker 1 on 127\.0\.0\.1 died \(killed, crashed, or its machine was lost\)"
    ):
        engine.run(job(config, folder), StopRequest(), kill_at_first_step)
    assert any(isinstance(event, MessageEvent) and f"step_{step:08d}" in event.text for event in seen)
    assert next(event.step for event in seen if isinstance(event, StepEvent)) == step + 1


def _listens_on_loopback_only() -> None:
    """No process that this one started accepts connections from other machines."""
    found = [
        (process.name(), connection.laddr)
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(found) > 3
    assert [place for place in found if not _is_loopback(place[1].ip)] == []


def _is_loopback(address: str) -> bool:
    return address.removeprefix("::ffff:").startswith("127.") or address == "::1"


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of the kernel, below our own, in which 8 MiB may be newly taken; version 1 or 2 of groups."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    version_1 = Path("/sys/fs/cgroup/memory")
    parent = version_1 / own["memory"].lstrip("/") if "memory" in own else Path("/sys/fs/cgroup") / own[""].lstrip("/")
    limit = "memory.limit_in_bytes" if "memory" in own else "memory.max"
    group = parent / f"dino-scale-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(8 << 20))
    except OSError as error:
        pytest.skip(f"no control group for memory can be made below {parent} ({error.strerror}): needs root")
    try:
        yield group
    finally:
        group.rmdir()


@pytest.mark.slow
def test_a_kill_by_the_kernel_for_memory_is_no_lost_worker(
    engine: RayEngine, config: ChainConfig, tmp_path: Path, small_group: Path
) -> None:
    def squeeze(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 2:
            (small_group / "cgroup.procs").write_text(str(engine._team[1].pid))

    with pytest.raises(WorkerMemoryError, match=ADVICE):
        engine.run(job(config, tmp_path / "run"), StopRequest(), squeeze)
