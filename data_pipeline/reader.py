"""Reads image bytes straight out of the shards: one `pread` per sample, no tar parsing, no seeking."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from typing import Any

from data_pipeline.decode import RGBImage, decode
from data_pipeline.index import Index
from dino_scale.errors import DataError

OPEN_SHARDS = 64  # file descriptors kept open


class Reader:
    """Safe across fork (pread shares no position) and spawn (pickles without its descriptors)."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, latest used last

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_descriptors": OrderedDict()}

    def image_bytes(self, sample: int) -> bytes:
        """The JPEG of a sample. Raises DataError where shard and index disagree."""
        columns = self.index.columns
        shard, size = int(columns["shards"][sample]), int(columns["image_sizes"][sample])
        try:
            data = os.pread(self._descriptor(shard), size, int(columns["image_offsets"][sample]))
        except OSError as error:
            raise self._error(sample, f"cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise self._error(sample, f"ends after {len(data)} of {size} bytes")
        if zlib.crc32(data) != int(columns["image_checksums"][sample]):
            raise self._error(sample, "does not match its checksum")
        return data

    def image(self, sample: int) -> RGBImage:
        """(H, W, 3) uint8 pixels of a sample. Raises DataError naming shard, key and reason."""
        data = self.image_bytes(sample)
        try:
            pixels = decode(data)
        except DataError as error:
            raise self._error(sample, str(error)) from None
        if pixels.shape[:2] != self.index.size(sample):
            raise self._error(sample, f"is {pixels.shape[1]} x {pixels.shape[0]} pixels, not as indexed")
        return pixels

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
        path = self.index.folder / self.index.shard_names[shard]
        self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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
