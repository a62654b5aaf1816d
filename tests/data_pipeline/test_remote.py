"""Shards behind an address give the same bytes as shards on disk, whatever the server does."""

from __future__ import annotations

import pickle
import shutil
import threading
from pathlib import Path

import fsspec
import pytest

from data_pipeline.dataset import open_dataset, open_remote
from data_pipeline.index import Index
from data_pipeline.loader import training_microbatches
from data_pipeline.reader import Reader
from data_pipeline.remote import Range, RemoteFolder
from dino_scale.config.schema import AugmentationConfig, BatchConfig
from dino_scale.errors import ConfigError, DataError
from tests.support.object_store import serve

AUGMENTATION = AugmentationConfig(scales=(64, 80), max_size=128, crop_resize=(72,), crop_min=48, crop_max=72)


@pytest.fixture
def http() -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http addresses through aiohttp, which is not installed")


def all_images(index: Index) -> list[bytes]:
    reader = Reader(index)
    reader.prefetch(range(len(index)))
    return [reader.image_bytes(sample) for sample in range(len(index))]


def impatient(url: str, **settings: float) -> RemoteFolder:
    return RemoteFolder(url, **{"backoff": 0.01, "timeout": 30.0, "outage": 0.0, **settings})  # type: ignore[arg-type]


def test_a_store_that_works(http: None, scenes: Index, tmp_path: Path) -> None:
    with serve(scenes.folder) as store:
        index = open_dataset(store.url, str(tmp_path))
        assert index.digest == scenes.digest and index.categories == scenes.categories
        assert all_images(index) == all_images(scenes)
        shard_requests = [request for request in store.requests if ".tar" in request[0]]
        assert len(shard_requests) == len(scenes), "one ranged request per image"
        assert all(end - start < 50_000 for _, start, end in shard_requests)
        again = open_dataset(store.url, str(tmp_path))
        assert again.digest == index.digest
        assert sum(".npy" in request[0] for request in store.requests) == len(index.manifest.columns), "copied once"


@pytest.mark.parametrize("in_flight", [3, 8])
def test_as_many_requests_at_once_as_allowed(http: None, scenes: Index, tmp_path: Path, in_flight: int) -> None:
    """The store answers nobody before so many have asked; its answers are slow, so that one too many would be seen."""
    with serve(scenes.folder, lambda name, earlier: "slow" if name.endswith("tar") else "none") as store:
        index = open_remote(impatient(store.url, in_flight=in_flight), str(tmp_path))
        store.most, store.gathering = 0, in_flight
        assert all_images(index) == all_images(scenes)
        assert 1 < store.most == in_flight < len(scenes)


@pytest.mark.parametrize("fault", ["error", "short", "slow", "stalled", "flipped", "whole"])
def test_a_store_that_fails_at_first(http: None, scenes: Index, tmp_path: Path, fault: str) -> None:
    """The first requests for every image of one shard go wrong, and the first one for some columns."""

    def faults(name: str, earlier: int) -> str:
        if name == "shard-00001.tar":
            return fault if earlier < (1 if fault == "stalled" else 2) else "none"
        column = name in ("boxes.npy", "labels.npy") and fault != "flipped"  # there only the whole file's digest tells
        return fault if column and earlier == 0 else "none"

    with serve(scenes.folder, faults) as store:
        remote = impatient(store.url, timeout=2.0 if fault == "stalled" else 30.0)
        index = open_remote(remote, str(tmp_path))
        assert all_images(index) == all_images(scenes)
        asked = len([request for request in store.requests if ".tar" in request[0]])
        assert asked == len(scenes) + {"slow": 0, "stalled": 16}.get(fault, 32), "only what failed is asked for again"


def test_training_steps_are_the_same_from_a_faulty_store(http: None, scenes: Index, tmp_path: Path) -> None:
    kinds = ("error", "short", "flipped")

    def faults(name: str, earlier: int) -> str:
        return kinds[earlier] if name == "shard-00002.tar" and earlier < 3 else "none"

    with serve(scenes.folder, faults) as store:
        index = open_remote(impatient(store.url), str(tmp_path))
        for workers in (0, 1):
            assert steps(index, workers) == steps(scenes, 0)


def steps(index: Index, workers: int) -> list[tuple[tuple[int, ...], bytes]]:
    items = training_microbatches(
        index, seed=3, augmentation=AUGMENTATION, batch=BatchConfig(8, 4), rank=0, world=1, first_step=0, last_step=2,
        loader_workers=workers,
    )  # fmt: skip
    return [(batch.sample_ids, batch.images.numpy().tobytes()) for step in items for batch in step]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("error", "503"), ("short", "Payload"), ("flipped", "checksum"), ("whole", "bytes came"), ("stalled", "Timeout")],
)
def test_a_store_that_never_recovers(http: None, scenes: Index, tmp_path: Path, fault: str, expected: str) -> None:
    with serve(scenes.folder, lambda name, earlier: fault if name.endswith("tar") else "none") as store:
        index = open_remote(impatient(store.url, tries=3, timeout=0.5 if fault == "stalled" else 30.0), str(tmp_path))
        with pytest.raises(DataError, match=expected) as caught:
            Reader(index).image_bytes(4)
        assert index.key(4) in str(caught.value) and "\n" not in str(caught.value)
        assert len([request for request in store.requests if ".tar" in request[0]]) == 3


def test_a_shard_that_is_gone_is_not_asked_for_again(http: None, scenes: Index, tmp_path: Path) -> None:
    shutil.copytree(scenes.folder, tmp_path / "copy")
    with serve(tmp_path / "copy") as store:
        index = open_remote(impatient(store.url), str(tmp_path / "cache"))
        (tmp_path / "copy" / index.shard_names[0]).unlink()
        with pytest.raises(DataError, match="No such file"):
            Reader(index).image_bytes(0)
    with serve(tmp_path) as store, pytest.raises(DataError, match=r"manifest\.json: does not exist"):
        open_remote(impatient(store.url), str(tmp_path / "cache"))


def test_shards_are_copied_once_per_node(http: None, scenes: Index, tmp_path: Path) -> None:
    with serve(scenes.folder) as store:
        index = open_remote(impatient(store.url), str(tmp_path), cache_shards=True)
        copies: list[list[bytes]] = []
        text = pickle.dumps(index)
        threads = [threading.Thread(target=lambda: copies.append(all_images(pickle.loads(text)))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert copies == [all_images(scenes)] * 4
        assert sum(".tar" in request[0] for request in store.requests) == len(scenes.shard_names)


def test_an_altered_shard_or_column_is_not_taken(http: None, scenes: Index, tmp_path: Path) -> None:
    with serve(scenes.folder, lambda name, earlier: "flipped" if name.endswith("tar") else "none") as store:
        index = open_remote(impatient(store.url), str(tmp_path), cache_shards=True)
        with pytest.raises(DataError, match="its SHA-256 is not the manifest's"):
            Reader(index).image_bytes(0)
    with (
        serve(scenes.folder, lambda name, earlier: "flipped" if name.endswith("npy") else "none") as store,
        pytest.raises(DataError, match="its SHA-256 is not the manifest's"),
    ):
        open_remote(impatient(store.url), str(tmp_path / "other"))
    assert not list((tmp_path / "other").rglob("*.partial"))


def test_any_other_store_of_fsspec_works_alike(scenes: Index, tmp_path: Path) -> None:
    """Without a network: fsspec's own store in memory."""
    memory = fsspec.filesystem("memory")
    memory.put(str(scenes.folder), "/bucket/scenes", recursive=True)
    for cache_shards in (False, True):
        index = open_dataset("memory://bucket/scenes", str(tmp_path / str(cache_shards)), cache_shards)
        assert all_images(index) == all_images(scenes)
    found = RemoteFolder("memory://bucket/scenes", tries=1).read([Range("nothing", 0, 4, lambda _: True)])
    assert isinstance(found[0], DataError) and "No such file" in str(found[0])


@pytest.mark.parametrize("address", ["pipe:cat /etc/passwd", "file:///etc", "ftp://host/x", "pipe://x"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="nothing else is opened"):
        open_dataset(address)
