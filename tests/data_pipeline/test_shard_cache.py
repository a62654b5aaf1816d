"""The shard cache of a node under several processes: bounded, shared, and never wrong."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.dataset import open_dataset, open_remote, open_shard
from data_pipeline.index import Index
from data_pipeline.loader import StreamMode, training_microbatches
from data_pipeline.order import WINDOW
from data_pipeline.pack import pack
from data_pipeline.reader import Reader
from data_pipeline.remote import RemoteFolder
from data_pipeline.shard_cache import locked
from data_pipeline.synthetic import Split
from dino_scale.config.schema import AugmentationConfig, BatchConfig
from dino_scale.errors import ConfigError, DataError
from tests.support.object_store import Store, serve

pytest.importorskip("aiohttp", reason="fsspec reads http addresses through aiohttp, which is not installed")

ROOT = Path(__file__).parents[2]


def shard_sizes(index: Index) -> list[int]:
    return [entry.size for entry in index.manifest.shards]


def remote_index(store: Store, cache: Path, limit: int) -> Index:
    return open_remote(RemoteFolder(store.url, backoff=0.01, timeout=30.0), str(cache), True, limit)


def kept(index: Index) -> list[str]:
    return sorted(path.name for path in index.folder.glob("*.tar"))


def sample_in(index: Index, shard: int) -> int:
    return index.columns["shards"].tolist().index(shard)


def taken(cache: Path) -> int:
    """Bytes of all copies, finished or not, at one moment."""
    with locked(cache / "lock"):
        return sum(path.stat().st_size for pattern in ("*.tar", "*.tar.partial") for path in cache.glob(f"*/{pattern}"))


def start_reader(store: Store, cache: Path, limit: int, seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.cache_reader", store.url, str(cache), str(limit), str(seed)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_shard_used_longest_ago_goes_first(scenes: Index, tmp_path: Path) -> None:
    limit = sum(sorted(shard_sizes(scenes))[-2:])
    with serve(scenes.folder) as store:
        index = remote_index(store, tmp_path, limit)
        reader = Reader(index)
        for shard in (0, 1, 0, 2):
            reader.image_bytes(sample_in(index, shard))
        assert kept(index) == ["shard-00000.tar", "shard-00002.tar"]
        reader.image_bytes(sample_in(index, 1))
        assert kept(index) == ["shard-00001.tar", "shard-00002.tar"]
        assert [request[0] for request in store.requests if ".tar" in request[0]] == [
            f"/shard-0000{number}.tar" for number in (0, 1, 2, 1)
        ]


def test_other_datasets_in_the_folder_count_and_go_first(scenes: Index, tmp_path: Path) -> None:
    """An unlimited run before has left copies; a limited one takes their place."""
    with serve(scenes.folder) as store:
        other = remote_index(store, tmp_path, 0)
        for shard in range(4):
            Reader(other).image_bytes(sample_in(other, shard))
        assert len(kept(other)) == 4
        os.rename(other.folder, tmp_path / "another")
        limit = sum(shard_sizes(scenes))
        index = remote_index(store, tmp_path, limit)
        Reader(index).image_bytes(sample_in(index, 3))
        assert kept(index) == ["shard-00003.tar"] and taken(tmp_path) <= limit
        assert not (tmp_path / "another/shard-00000.tar").exists(), "the oldest"


def test_what_is_open_can_still_be_read_after_it_was_thrown_out(scenes: Index, tmp_path: Path) -> None:
    """A reader without a limit keeps its shards open, one with a limit throws them out of the same folder."""
    with serve(scenes.folder) as store:
        unlimited, limited = remote_index(store, tmp_path, 0), remote_index(store, tmp_path, max(shard_sizes(scenes)))
        patient = Reader(unlimited)
        first = patient.image_bytes(sample_in(unlimited, 0))
        Reader(limited).image_bytes(sample_in(limited, 1))
        assert kept(limited) == ["shard-00001.tar"]
        downloads = len(store.requests)
        assert patient.image_bytes(sample_in(unlimited, 0)) == first and len(store.requests) == downloads
        assert Reader(unlimited).image_bytes(sample_in(unlimited, 0)) == first, "a new reader copies it again"


def test_a_reader_with_a_limit_holds_no_space(scenes: Index, tmp_path: Path) -> None:
    with serve(scenes.folder) as store:
        index = remote_index(store, tmp_path, max(shard_sizes(scenes)))
        reader = Reader(index)
        for shard in (0, 1, 2):
            reader.image_bytes(sample_in(index, shard))
        open_files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert not [path for path in open_files if str(tmp_path) in path and ".tar" in path and ".lock" not in path]


def test_windows_need_each_shard_once_per_epoch(raw_scenes: dict[str, Split], tmp_path: Path) -> None:
    """With room for two windows of 16 shards, and through the loader."""
    split = raw_scenes["train"]
    pack(split.annotations, [split.images], tmp_path / "shards", samples_per_shard=4)
    whole = Index.open(tmp_path / "shards")
    limit = sum(sorted(shard_sizes(whole))[-2 * WINDOW :])
    asked: dict[StreamMode, int] = {}
    orders: tuple[StreamMode, ...] = ("windowed", "permutation")
    for order in orders:
        with serve(whole.folder) as store:
            index = remote_index(store, tmp_path / order, limit)
            steps = training_microbatches(
                index, seed=0, augmentation=AugmentationConfig(scales=(32,), crop=0.0), batch=BatchConfig(4, 4), rank=0,
                world=1, first_step=0, last_step=15, loader_workers=0, order=order,
            )  # fmt: skip
            assert sum(len(batch.sample_ids) for step in steps for batch in step) == 60 == len(whole) - 1
            asked[order] = sum(".tar" in request[0] for request in store.requests)
    assert len(whole.shard_names) == 16 == asked["windowed"] < asked["permutation"]


def test_many_processes_share_a_small_cache(scenes: Index, tmp_path: Path) -> None:
    """Room for two of four shards and three processes that want all of them: everyone reads the right bytes, and the
    copies never take more than the limit."""
    reader = Reader(scenes)
    expected = hashlib.sha256(b"".join(map(reader.image_bytes, range(len(scenes))))).hexdigest()
    limit = sum(sorted(shard_sizes(scenes))[-2:])
    (tmp_path / "cache").mkdir()
    most = 0
    with serve(scenes.folder, lambda name, earlier: "slow" if name.endswith("tar") else "none") as store:
        processes = [start_reader(store, tmp_path / "cache", limit, seed) for seed in range(3)]
        while any(process.poll() is None for process in processes):
            most = max(most, taken(tmp_path / "cache"))
            time.sleep(0.005)
        for process in processes:
            output, errors = process.communicate()
            assert process.returncode == 0, errors
            assert output.split()[0] == expected
        downloads = sum(".tar" in request[0] for request in store.requests)
    assert max(shard_sizes(scenes)) < most <= limit
    assert downloads > 4, "with so little room shards come more than once"


def test_a_killed_download_leaves_no_claim_behind(scenes: Index, tmp_path: Path) -> None:
    with serve(scenes.folder, lambda name, earlier: "stalled" if name.endswith("tar") else "none") as store:
        process = start_reader(store, tmp_path, max(shard_sizes(scenes)), 0)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/*.tar.partial")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert taken(tmp_path) > 0, "its claim is there"
    with serve(scenes.folder) as store:
        index = remote_index(store, tmp_path, max(shard_sizes(scenes)))
        for shard in range(4):
            sample = sample_in(index, shard)
            assert Reader(index).image_bytes(sample) == Reader(scenes).image_bytes(sample)
        assert not list(tmp_path.glob("*/*.partial"))


def test_a_failed_download_leaves_no_claim_behind(scenes: Index, tmp_path: Path) -> None:
    with serve(scenes.folder, lambda name, earlier: "flipped" if name.endswith("tar") else "none") as store:
        index = remote_index(store, tmp_path, max(shard_sizes(scenes)))
        with pytest.raises(DataError, match="SHA-256"):
            Reader(index).image_bytes(0)
        assert taken(tmp_path) == 0


def test_a_cut_copy_is_fetched_anew(scenes: Index, tmp_path: Path) -> None:
    with serve(scenes.folder) as store:
        for limit in (0, max(shard_sizes(scenes))):
            index = remote_index(store, tmp_path / str(limit), limit)
            expected = Reader(index).image_bytes(0)
            copy = index.folder / index.shard_names[0]
            copy.write_bytes(copy.read_bytes()[:-512])
            assert Reader(index).image_bytes(0) == expected
            assert copy.stat().st_size == shard_sizes(index)[0]


def test_a_limit_below_one_shard_is_refused(scenes: Index, tmp_path: Path) -> None:
    with serve(scenes.folder) as store:
        with pytest.raises(ConfigError, match=r"cache_gigabytes is 1e-09: expected at least .* or 0 for no limit"):
            open_dataset(store.url, str(tmp_path), cache_shards=True, cache_gigabytes=1e-9)
        index = open_dataset(store.url, str(tmp_path), cache_shards=True, cache_gigabytes=1.0)
        assert index.cache is not None and index.cache.limit == 10**9
        os.close(open_shard(index, 0))
        assert kept(index) == ["shard-00000.tar"]
