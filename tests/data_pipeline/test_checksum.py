"""The checksums in every index are zlib's CRC-32, whoever computes them."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.checksum import crc32
from data_pipeline.index import Index
from data_pipeline.reader import Reader


@given(st.binary(max_size=300))
def test_equals_zlib(data: bytes) -> None:
    assert crc32(data) == zlib.crc32(data)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 63, 64, 65, 1023, 4096, 100_003])
def test_equals_zlib_at_every_width_of_its_inner_loops(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size + 3, dtype=np.uint8).tobytes()
    for start in range(3):  # not aligned
        assert crc32(data[start:]) == zlib.crc32(data[start:])


def test_the_index_holds_zlibs_numbers(scenes: Index) -> None:
    reader = Reader(scenes)
    found = [zlib.crc32(reader.unchecked_bytes(sample)) for sample in range(len(scenes))]
    assert found == scenes.columns["image_checksums"].tolist()
