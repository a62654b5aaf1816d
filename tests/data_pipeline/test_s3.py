"""Shards behind s3://, through s3fs, against a server on this machine that speaks the reading part of the protocol."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.dataset import open_dataset, open_remote
from data_pipeline.index import Index
from data_pipeline.loader import training_microbatches
from data_pipeline.reader import Reader
from data_pipeline.remote import RemoteFolder
from dino_scale.config.schema import AugmentationConfig, BatchConfig
from dino_scale.errors import DataError
from tests.support.object_store import S3_KEY, Store, serve

s3fs = pytest.importorskip("s3fs", reason="fsspec reads s3 addresses through s3fs, which is not installed")

AUGMENTATION = AugmentationConfig(scales=(64, 80), max_size=128, crop_resize=(72,), crop_min=48, crop_max=72)


@pytest.fixture
def bucket(scenes: Index, tmp_path: Path) -> Path:
    """A folder that holds BUCKET/shards/scenes."""
    (tmp_path / "store/bucket/shards").mkdir(parents=True)
    (tmp_path / "store/bucket/shards/scenes").symlink_to(scenes.folder)
    return tmp_path / "store"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Whatever this machine knows about Amazon is out of the way."""
    for name, value in S3_KEY.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


def address(client: pytest.MonkeyPatch, store: Store) -> str:
    client.setenv("AWS_ENDPOINT_URL", store.url)
    return "s3://bucket/shards/scenes"


def images(index: Index) -> list[bytes]:
    reader = Reader(index)
    reader.prefetch(range(len(index)))
    return [reader.image_bytes(sample) for sample in range(len(index))]


def steps(index: Index) -> list[tuple[tuple[int, ...], bytes]]:
    items = training_microbatches(
        index, seed=3, augmentation=AUGMENTATION, batch=BatchConfig(8, 4), rank=0, world=1, first_step=0, last_step=2,
        loader_workers=0,
    )  # fmt: skip
    return [(batch.sample_ids, batch.images.numpy().tobytes()) for step in items for batch in step]


def test_images_by_range_and_whole_shards(
    client: pytest.MonkeyPatch, bucket: Path, scenes: Index, tmp_path: Path
) -> None:
    with serve(bucket, s3=True) as store:
        index = open_dataset(address(client, store), str(tmp_path / "cache"))
        assert index.digest == scenes.digest and images(index) == images(scenes)
        asked = [request for request in store.requests if ".tar" in request[0]]
        assert len(asked) == len(scenes) and all(name.startswith("/bucket/shards/scenes/") for name, _, _ in asked)
        assert steps(index) == steps(scenes)
        whole = open_dataset(address(client, store), str(tmp_path / "cache"), cache_shards=True)
        assert images(whole) == images(scenes)


@pytest.mark.parametrize("fault", ["error", "short", "flipped"])
def test_a_store_that_fails_at_first(
    client: pytest.MonkeyPatch, bucket: Path, scenes: Index, tmp_path: Path, fault: str
) -> None:
    def faults(name: str, earlier: int) -> str:
        return fault if name == "shard-00001.tar" and earlier < 2 else "none"

    with serve(bucket, faults, s3=True) as store:
        remote = RemoteFolder(address(client, store), backoff=0.01, timeout=30.0)
        index = open_remote(remote, str(tmp_path / "cache"))
        assert images(index) == images(scenes)
        asked = len([request for request in store.requests if ".tar" in request[0]])
        assert asked == len(scenes) + 2 * 16, "only what failed is asked for again"


def test_what_is_missing_or_forbidden(client: pytest.MonkeyPatch, bucket: Path, tmp_path: Path) -> None:
    with serve(bucket, s3=True) as store:
        place = address(client, store)
        with pytest.raises(DataError, match=r"s3://bucket/shards/nothing/manifest\.json: does not exist"):
            open_dataset("s3://bucket/shards/nothing", str(tmp_path / "cache"))
        client.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(DataError, match=r"cannot be read after 2 tries .*PermissionError") as caught:
            open_remote(RemoteFolder(place, tries=2, backoff=0.01), str(tmp_path / "cache"))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_from_a_bucket(client: pytest.MonkeyPatch, bucket: Path, tmp_path: Path) -> None:
    """On the command line, with loader processes; the environment says where the store is and who asks."""
    configs = Path(__file__).parents[2] / "configs"
    with serve(bucket, s3=True) as store:
        (tmp_path / "chain.yaml").write_text(
            f"name: bucket\nmodel: {{extends: {configs}/model/small.yaml, hidden: 32, heads: 2, queries: 40}}\n"
            "launch: {engine: ray, workers: 2, threads: 1}\n"
            f"stages:\n  only:\n    extends: {configs}/stage/small_images.yaml\n"
            f"    data: {{train: '{address(client, store)}', validation: '', cache: {tmp_path}/c, loader_workers: 1}}\n"
            "    batch: {global_size: 4, microbatch: 2}\n    schedule: {steps: 3}\n    log_every_steps: 1\n"
        )
        command = [
            sys.executable,
            "-m",
            "launch",
            "train",
            str(tmp_path / "chain.yaml"),
            "--run-dir",
            str(tmp_path / "r"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        assert any("/bucket/shards/scenes/shard-" in request[0] for request in store.requests)
    lines = [json.loads(line) for line in (tmp_path / "r/only/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["replaced_samples"] == 0
