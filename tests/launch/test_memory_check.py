"""A chain that cannot fit is refused before a worker starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dino_scale.config.decode import load_chain
from dino_scale.config.schema import BatchConfig, ChainConfig, LaunchConfig, WorkerRange
from dino_scale.errors import UserError
from launch.cli import main
from launch.commands.demo import CHAIN, with_data_in
from launch.memory_check import Room, free_host_memory, require_memory, room_here, workers_here

TWO = WorkerRange(2, 2)


@pytest.fixture
def chain(tiny_data: Path) -> ChainConfig:
    return with_data_in(load_chain(CHAIN), tiny_data)


def room(gigabytes: float, device: str = "cuda") -> Room:
    return Room(int(gigabytes * 1e9), device, f"{gigabytes} GB")


def test_what_fits_is_let_through(chain: ChainConfig) -> None:
    require_memory(chain, TWO, room(100))  # fits however much a pixel takes
    require_memory(chain, TWO, room(0.5))  # fits by measurement only
    require_memory(chain, TWO, room(2, "cpu"))


def test_a_smaller_microbatch_is_the_remedy(chain: ChainConfig) -> None:
    with pytest.raises(UserError) as caught:
        require_memory(chain, TWO, room(0.3))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("stages.pretrain needs about 0.")
    assert "(microbatch 8, images up to 160 x 160, ZeRO 1, 2 worker(s)), but there is 0.3 GB: " in text
    assert "it would fit with --set stages.pretrain.batch.microbatch=4, or skip this check with" in text
    smaller = {name: replace(stage, batch=BatchConfig(16, 4)) for name, stage in chain.stages.items()}
    require_memory(replace(chain, stages=smaller), TWO, room(0.3))  # the remedy is one


def test_nothing_helps(chain: ChainConfig) -> None:
    with pytest.raises(UserError, match=r"augmentation\.max_size and scales, or use workers with more memory"):
        require_memory(chain, TWO, room(0.01))


def test_train_refuses(chain: ChainConfig, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command, with this machine's own memory; nothing is written."""
    data = [
        f"stages.{name}.data.{key}={tiny_data / domain / key}"
        for name, domain in (("pretrain", "objects"), ("finetune", "scenes"), ("scratch", "scenes"))
        for key in ("train", "validation")
    ]
    huge = ["stages.pretrain.augmentation.max_size=30000", "stages.pretrain.augmentation.scales=[30000]"]
    options = [part for setting in (*data, *huge, "launch.engine=local") for part in ("--set", setting)]
    assert main(["train", str(CHAIN), "--run-dir", str(tmp_path / "run"), *options]) == 2
    text = capsys.readouterr().err
    assert "dino-scale: stages.pretrain needs about" in text
    assert "of free memory for 1 worker(s) on this machine" in text or "a GPU of" in text
    assert not (tmp_path / "run").exists()


def test_workers_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers_here(LaunchConfig(engine="torchrun"), 16) == 4
    assert workers_here(LaunchConfig(workers=3), 3) == 3
    assert workers_here(LaunchConfig(engine="local"), 1) == 1
    assert workers_here(LaunchConfig(workers=3, address="10.0.0.1:6379"), 3) is None


def test_free_memory_heeds_a_containers_limit(tmp_path: Path) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    meminfo.write_text("MemTotal:  8000 kB\nMemAvailable:    5000 kB\n")
    assert free_host_memory(meminfo, group) == 5000 * 1024
    group.mkdir()
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("1000000\n")
    assert free_host_memory(meminfo, group) == 2_000_000
    (group / "memory.max").write_text("max\n")
    assert free_host_memory(meminfo, group) == 5000 * 1024


def test_room_is_shared_by_the_workers_of_a_machine() -> None:
    one, four = room_here(1), room_here(4)
    assert one.bytes > 10**8
    assert four.device == "cuda" or four.bytes < one.bytes
