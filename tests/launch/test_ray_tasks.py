"""Packing as Ray tasks, on a Ray of this machine: the same bytes, through killed processes and interrupted calls."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from data_pipeline.doctor import examine
from data_pipeline.index import Index
from data_pipeline.pack import pack
from data_pipeline.synthetic import Split, write_synthetic
from dino_scale.errors import DataError, UserError, WorkerLostError
from dino_scale.training.control import Event
from launch.cli import main
from launch.ray_tasks import RayTasks
from tests.support.packing_tasks import Deadly


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def ignore(_: Event) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    folder = tmp_path_factory.mktemp("raw") / "scenes"
    return write_synthetic(folder, "scenes", seed=5, train=40, validation=1)["train"]


def test_packing_on_ray(split: Split, tmp_path: Path) -> None:
    """In one test, because starting Ray takes longer than all the rest."""
    pack(split.annotations, [split.images], tmp_path / "here", samples_per_shard=8)
    expected = digests(tmp_path / "here")
    with RayTasks("local", 2, ignore) as runner:
        _a_process_that_dies_is_replaced(runner, split, tmp_path, expected, before=True)
        _an_error_keeps_what_is_finished(runner, split, tmp_path, expected)
        found = examine(split.annotations, [split.images], samples_per_shard=8, runner=runner)
        assert (found.samples, found.shards) == (40, 5)
        assert list(runner.map(abs, (-number for number in range(9)))) == list(range(9)), "in order"


@pytest.mark.slow
def test_more_deaths(split: Split, tmp_path: Path) -> None:
    """After a shard was written but before that was told; and again and again."""
    pack(split.annotations, [split.images], tmp_path / "here", samples_per_shard=8)
    with RayTasks("local", 2, ignore) as runner:
        _a_process_that_dies_is_replaced(runner, split, tmp_path, digests(tmp_path / "here"), before=False)
        with pytest.raises(WorkerLostError, match="a packing task was lost 4 times"):
            list(runner.map(os._exit, [3]))


def _a_process_that_dies_is_replaced(
    runner: RayTasks, split: Split, folder: Path, expected: dict[str, str], before: bool
) -> None:
    deadly = Deadly(runner, folder / "died", before)
    pack(split.annotations, [split.images], folder / "there", samples_per_shard=8, runner=deadly)
    assert deadly.mark.exists(), "a process has died"
    assert digests(folder / "there") == expected


def _an_error_keeps_what_is_finished(runner: RayTasks, split: Split, folder: Path, expected: dict[str, str]) -> None:
    """A picture of the fourth shard is damaged, then mended; only what was missing is written by the second call."""
    index = Index.open(folder / "here")
    victim = split.images / index.file_name(index.columns["shards"].tolist().index(3))
    data, facts = victim.read_bytes(), victim.stat()
    victim.write_bytes(data[: len(data) - 200] + bytes(200))
    os.utime(victim, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    out = folder / "again"
    with pytest.raises(DataError, match=f"{victim.name}: image"):
        pack(split.annotations, [split.images], out, samples_per_shard=8, runner=runner)
    finished = {path: path.stat().st_mtime_ns for path in (folder / ".again.partial").glob("shard-*.tar")}
    assert finished and not out.exists()
    victim.write_bytes(data)
    os.utime(victim, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    pack(split.annotations, [split.images], out, samples_per_shard=8, runner=runner)
    assert digests(out) == expected
    assert {out / path.name: time for path, time in finished.items()}.items() <= {
        path: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")
    }.items()


def test_bad_arguments(split: Split, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--workers is 0"):
        RayTasks("local", 0, ignore)
    arguments = ["pack", "--annotations", str(split.annotations), "--images", str(split.images)]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--workers", "0"]) == 2
    assert "--workers is 0" in capsys.readouterr().err


@pytest.mark.slow
def test_on_the_command_line(split: Split, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pack", "--annotations", str(split.annotations), "--images", str(split.images)]
    assert main([*arguments, "--out", str(tmp_path / "here")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "there"), "--address", "local", "--workers", "2"]) == 0
    assert "starting Ray on this machine" in capsys.readouterr().out
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert main([*arguments, "--out", str(tmp_path / "nowhere"), "--address", "127.0.0.1:1"]) == 2
    assert "no Ray cluster answers there" in capsys.readouterr().err
