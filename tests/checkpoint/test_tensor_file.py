"""Safetensors files written as a stream: the library reads them; headers that lie are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dino_scale.checkpoint.tensor_file import TensorEntry, digest_file, read_header
from dino_scale.checkpoint.tensor_writer import write_tensors
from dino_scale.errors import CheckpointError

TENSORS = {
    "flag": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "scalar": torch.tensor(-0.0),
    "empty": torch.empty(0, 4),
    "wide": torch.linspace(0, 1, 7, dtype=torch.float64),
    "count": torch.tensor([1 << 60, -1]),
    "longer than a block": torch.arange(3 << 20, dtype=torch.int32),
    'quote " \\ é': torch.full((2, 1, 2), float("nan")),
}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = write_tensors(path, TENSORS)
    content = path.read_bytes()
    assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert digest_file(path) == entry
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert read[name].view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8))
    assert read_header(path, 10**4)["wide"] == TensorEntry("F64", (7,))


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", TENSORS)
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x", {})


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(dtype: str = "F32", shape: object = (2,), begin: object = 0, end: object = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DATA = bytes(8)
LIES = {
    "said to have 18446744073709551615 bytes": b"\xff" * 8 + DATA,
    "said to have 9 bytes": (9).to_bytes(8, "little") + DATA,
    "the file has 3": b"\x01\x02\x03",
    "at most 1000 expected": header(**{"a" * 2000: tensor()}) + DATA,
    "Expecting value": (900).to_bytes(8, "little") + b"[" * 900 + DATA,
    "holds a list": (2).to_bytes(8, "little") + b"[]" + DATA,
    "'a' stands twice": (len(b'{"a":1,"a":1}')).to_bytes(8, "little") + b'{"a":1,"a":1}' + DATA,
    "NaN is not JSON": (9).to_bytes(8, "little") + b'{"a":NaN}' + DATA,
    "does not fit into": header(a=tensor(shape=(1 << 62,))) + DATA,
    "a has shape": header(a=tensor(shape=(-2, -1))) + DATA,
    "has shape [2] at [-8, 0]": header(a=tensor(begin=-8, end=0)) + DATA,
    "has shape [2.0]": header(a=tensor(shape=(2.0,))) + DATA,
    "has shape [True, 2]": header(a=tensor(shape=(True, 2))) + DATA,
    "overlap or leave a hole": header(a=tensor(shape=(1,), end=4), b=tensor(shape=(1,), end=4)) + DATA,
    "hole at byte": header(a=tensor(shape=(1,), begin=4)) + DATA,
    "end at byte 8 of 16": header(a=tensor()) + DATA + DATA,
    "end at byte 8 of 0": header(a=tensor()),
    "'F33'": header(a=tensor(dtype="F33")) + DATA,
    "'data_offsets'": header(a={"dtype": "F32", "shape": [2]}) + DATA,
    "not that of a safetensors file": header(a=7) + DATA,
    "can't decode": (2).to_bytes(8, "little") + b"\xff\xfe" + DATA,
}


@pytest.mark.parametrize("said", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, said: str) -> None:
    (tmp_path / "x").write_bytes(LIES[said])
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "x", 1000)
    assert said in str(caught.value)


def test_an_honest_header_of_that_kind_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(header(a=tensor(), __metadata__={"by": "someone"}) + DATA)
    assert read_header(tmp_path / "x", 1000) == {"a": TensorEntry("F32", (2,))}
