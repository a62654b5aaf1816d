"""python -m tests.support.cache_reader URL CACHE LIMIT SEED: reads all images of a remote dataset through a shard
cache, in an order of its own, and prints the SHA-256 of their bytes in the order of the index."""

import hashlib
import sys
from pathlib import Path

import numpy as np

from data_pipeline.dataset import open_remote
from data_pipeline.reader import Reader
from data_pipeline.remote import RemoteFolder


def main(url: str, cache: str, limit: int, seed: int) -> None:
    index = open_remote(RemoteFolder(url, timeout=30.0), cache, cache_shards=True, cache_limit=limit)
    reader = Reader(index)
    found: dict[int, bytes] = {}
    for sample in np.random.default_rng(seed).permutation(len(index)).tolist():
        found[sample] = reader.image_bytes(sample)
    print(hashlib.sha256(b"".join(found[sample] for sample in sorted(found))).hexdigest(), Path(cache).name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
