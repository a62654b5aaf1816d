"""Reads image bytes straight out of the shards: one `pread` per sample, or one ranged request where they are remote."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from data_pipeline.checksum import crc32
from data_pipeline.dataset import open_shard
from data_pipeline.decode import RGBImage, decode
from data_pipeline.index import Index
from data_pipeline.remote import Range
from dino_scale.errors import DataError

OPEN_SHARDS = 64  # file descriptors kept open


class Reader:
    """Safe across fork (pread shares no position) and spawn (pickles without its descriptors)."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, latest used last
        self._fetched: dict[int, bytes | DataError] = {}  # samples asked for ahead

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_descriptors": OrderedDict(), "_fetched": {}}

    def prefetch(self, samples: Sequence[int]) -> None:
        """Asks for remote samples together, as many at once as the remote folder allows; nothing to do for files."""
        remote = self.index.remote
        if remote is None or self.index.cache is not None:
            return
        self._fetched = dict(zip(samples, remote.read([self._range(sample) for sample in samples]), strict=True))

    def _range(self, sample: int) -> Range:
        columns = self.index.columns
        checksum = int(columns["image_checksums"][sample])
        return Range(
            name=self.index.shard_names[int(columns["shards"][sample])],
            start=int(columns["image_offsets"][sample]),
            size=int(columns["image_sizes"][sample]),
            fits=lambda data: crc32(data) == checksum,
        )

    def image_bytes(self, sample: int) -> bytes:
        """The JPEG of a sample. Raises DataError where shard and index disagree."""
        if self.index.remote is not None and self.index.cache is None:
            found = self._fetched.pop(sample, None)
            if found is None:
                [found] = self.index.remote.read([self._range(sample)])
            if isinstance(found, DataError):
                raise self._error(sample, f"is not to be had: {found}")
            return found
        data = self.unchecked_bytes(sample)
        if crc32(data) != int(self.index.columns["image_checksums"][sample]):
            raise self._error(sample, "does not match its checksum")
        return data

    def unchecked_bytes(self, sample: int) -> bytes:
        """From a shard on this node, right in number, whatever they are."""
        columns = self.index.columns
        shard, size = int(columns["shards"][sample]), int(columns["image_sizes"][sample])
        try:
            data = os.pread(self._descriptor(shard), size, int(columns["image_offsets"][sample]))
            if self._shards_may_go:
                self.close()
        except OSError as error:
            raise self._error(sample, f"cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise self._error(sample, f"ends after {len(data)} of {size} bytes")
        return data

    def image(self, sample: int) -> RGBImage:
        """(H, W, 3) uint8 pixels of a sample. Raises DataError naming shard, key and reason."""
        data = self.image_bytes(sample)
        try:
            return decode(data, self.index.size(sample))
        except DataError as error:
            raise self._error(sample, str(error)) from None

    @property
    def _shards_may_go(self) -> bool:
        """From a cache with a limit. An open shard would keep its space on the disk after it was thrown out."""
        return self.index.cache is not None and self.index.cache.limit > 0

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        if len(self._descriptors) >= OPEN_SHARDS:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = open_shard(self.index, shard)
        return self._descriptors[shard]

    def _error(self, sample: int, problem: str) -> DataError:
        shard = self.index.folder / self.index.shard_names[int(self.index.columns["shards"][sample])]
        return DataError(
            f"{shard}: member {self.index.key(sample)}.jpg {problem}: restore the shard or pack the dataset anew"
        )


def read_image(index: Index, image_id: int) -> RGBImage:
    """(H, W, 3) uint8 pixels of one image, by its raw id."""
    reader = Reader(index)
    try:
        return reader.image(index.sample_of(image_id))
    finally:
        reader.close()
