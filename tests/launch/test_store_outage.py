"""A store of shards that does not answer for half a minute: the run waits, and learns what it would have learned."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dino_scale.config.decode import load_chain
from dino_scale.config.schema import ChainConfig
from dino_scale.training.control import Event, StepEvent
from launch.local_engine import LocalEngine
from launch.signals import StopRequest
from launch.worker import StageJob, StageResult
from tests.support.object_store import Fault, serve

OUTAGE_SECONDS, STEPS, FAULT_STEP = 30.0, 8, 3
CHAIN = """
model: {{extends: {configs}/model/small.yaml, hidden: 32, heads: 2, feedforward: 32}}
stages:
  only:
    extends: {configs}/stage/small_images.yaml
    data: {{train: {shards}, cache: {cache}}}
    batch: {{global_size: 4, microbatch: 2}}
    schedule: {{steps: 8}}
    log_every_steps: 1
    precision: fp32
"""


def configured(folder: Path, shards: str) -> ChainConfig:
    path = folder / "chain.yaml"
    configs = Path(__file__).parents[2] / "configs"
    path.write_text(CHAIN.format(configs=configs, shards=shards, cache=folder / "cache"))
    return load_chain(path)


class Outage:
    """Tells the store what to do, and sees the run's steps."""

    def __init__(self) -> None:
        self.ends = 0.0
        self.refused = 0
        self.first_new_step: float | None = None

    def fault(self, name: str, earlier: int) -> Fault:
        if time.monotonic() < self.ends:
            self.refused += 1
            return "error"
        return "none"

    def see(self, event: Event) -> None:
        if not isinstance(event, StepEvent):
            return
        if event.step == FAULT_STEP:
            self.ends = time.monotonic() + OUTAGE_SECONDS
        elif self.ends and time.monotonic() > self.ends and self.first_new_step is None:
            self.first_new_step = time.monotonic() - self.ends


@pytest.mark.slow
def test_half_a_minute_without_the_store(
    tiny_data: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    outage = Outage()
    with serve(tiny_data, outage.fault) as store, LocalEngine() as engine:
        config = configured(tmp_path, f"{store.url}/objects/train")
        stage = config.stages["only"]
        beside = replace(stage, data=replace(stage.data, train=str(tiny_data / "objects" / "train")))
        undisturbed = replace(config, stages={"only": beside})
        for name, chosen, see in (("undisturbed", undisturbed, lambda _: None), ("disturbed", config, outage.see)):
            job = StageJob(str(tmp_path / name), "only", chosen)
            assert engine.run(job, StopRequest(), see) == StageResult(STEPS)
    record_property("store back, seconds to first new step", outage.first_new_step)
    assert outage.refused > 0
    assert not (tmp_path / "disturbed" / "only" / "bad_samples.jsonl").exists()
    one, other = (load_file(tmp_path / run / "only" / "weights.safetensors") for run in ("disturbed", "undisturbed"))
    assert [name for name in one if one[name].numpy().tobytes() != other[name].numpy().tobytes()] == []
