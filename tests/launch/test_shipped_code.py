"""A cluster's machines may have another state of this program installed: workers run the driver's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.index import Index
from data_pipeline.synthetic import write_synthetic
from dino_scale.config.schema import LaunchConfig
from dino_scale.training.control import Event
from launch.cli import main
from launch.ray_session import RaySession, import_ray
from tests.support.fake_cluster import FakeCluster, fake_cluster

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "dino_scale", "data_pipeline", "launch")


@pytest.fixture
def stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which driver and node work, with packages of the same names and no content.

    As if the driver's own checkout were a newer one than the node's, both at the same path.
    """
    for name in PACKAGES:
        (tmp_path / "stale" / name).mkdir(parents=True)
        (tmp_path / "stale" / name / "__init__.py").touch()
    monkeypatch.chdir(tmp_path / "stale")
    return tmp_path / "stale"


@pytest.fixture
def cluster(stale: Path) -> Iterator[FakeCluster]:
    """Its one node with a CPU has the stale packages in its search path, too."""
    with fake_cluster(nodes=0) as cluster:
        cluster.add(PYTHONPATH=str(stale))
        yield cluster


def test_workers_run_the_code_that_was_sent_along(cluster: FakeCluster, stale: Path) -> None:
    own = _packages_without_shipping(cluster)
    assert {path.parents[1] for path in own} == {stale}, "the node has no other state: nothing is shown"
    session = RaySession(LaunchConfig(address=cluster.address))
    try:
        session.open(_ignore)
        shipped = _packages_on_the_node()
    finally:
        session.close()
    assert [path.parent.name for path in shipped] == list(PACKAGES)
    for path in shipped:
        assert not path.is_relative_to(stale) and not path.is_relative_to(ROOT)


@pytest.mark.slow
def test_packing_finds_folders_that_are_named_relative_to_the_driver(cluster: FakeCluster, stale: Path) -> None:
    write_synthetic(stale / "raw", "scenes", seed=5, train=8, validation=1)
    [annotations] = (stale / "raw").rglob("*train*.json")
    images = next(path for path in (stale / "raw").rglob("*") if path.is_dir() and list(path.glob("*.jpg")))
    command = ["pack", "--annotations", str(annotations.relative_to(stale)), "--images", str(images.relative_to(stale))]
    assert main([*command, "--out", "shards", "--address", cluster.address]) == 0
    assert len(Index.open(stale / "shards")) == 8


def _packages_without_shipping(cluster: FakeCluster) -> list[Path]:
    ray = import_ray()
    ray.init(address=cluster.address, logging_level="CRITICAL", log_to_driver=False)
    try:
        return _packages_on_the_node()
    finally:
        ray.shutdown()


def _packages_on_the_node() -> list[Path]:
    """The file of each package as a worker imports it."""

    def where(names: tuple[str, ...]) -> list[str]:  # inside, so that it travels as it is: these tests are not shipped
        import importlib

        return [str(importlib.import_module(name).__file__) for name in names]

    ray = import_ray()
    return [Path(file) for file in ray.get(ray.remote(num_cpus=1)(where).remote(PACKAGES))]


def _ignore(_: Event) -> None:
    """What the session says does not matter here."""
