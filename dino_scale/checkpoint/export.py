"""A weights file from a checkpoint of any number of workers and any ZeRO stage, in little memory and without a GPU.

It is the file that the stage writes at its end from the same state: the same bytes (`weights.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dino_scale.checkpoint.manifest import COMMON, Manifest, verify
from dino_scale.checkpoint.ranges import ITEM, ParameterReader, Shard, ShardWriter
from dino_scale.checkpoint.tensor_file import TensorEntry, in_file_order
from dino_scale.checkpoint.weights import Preparation, metadata
from dino_scale.config.schema import ModelConfig
from dino_scale.errors import CheckpointError
from dino_scale.model.dino import build_model
from dino_scale.structures import Category

AVERAGE = "ema"
_BLOCK = 4 << 20  # bytes that are in memory at once


@dataclass(frozen=True)
class Exported:
    """What was written: the number of tensors, and whether the trained ones are the averaged ones."""

    manifest: Manifest
    tensors: int
    averaged: bool


def export_weights(
    checkpoint: Path,
    target: Path,
    model: ModelConfig,
    categories: Sequence[Category],
    preparation: Preparation,
    *,
    averaged: bool = True,
) -> Exported:
    """Write the weights of `checkpoint` as the new file `target`; the averaged ones if it has them and `averaged`.

    All digests are checked first. Memory: a few megabytes, whatever the size. The file appears by one rename.
    CheckpointError for a damaged checkpoint, or one whose tensors are not those of `model`.
    """
    manifest = verify(checkpoint)
    kind = AVERAGE if averaged and AVERAGE in manifest.kinds else "fp32"
    common = Shard(checkpoint / COMMON)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        trained = {name: TensorEntry("F32", shape) for name, shape in manifest.parameters.items()}
        contents = in_file_order(trained | common.entries())
        _require_model(checkpoint, contents, model, len(categories))
        writer = ShardWriter(partial, contents, metadata(model, categories, preparation))
        with ParameterReader(checkpoint, manifest) as reader:
            _copy(contents, kind, reader, common, writer)
        writer.close()
        os.rename(partial, target)
    finally:
        common.close()
        partial.unlink(missing_ok=True)
    return Exported(manifest, len(contents), kind == AVERAGE)


def _copy(
    contents: dict[str, TensorEntry], kind: str, reader: ParameterReader, common: Shard, writer: ShardWriter
) -> None:
    untrained = common.entries()
    block = memoryview(bytearray(_BLOCK))
    for name, entry in contents.items():
        for first in range(0, entry.bytes, _BLOCK):
            part = block[: min(entry.bytes - first, _BLOCK)]
            if name in untrained:
                common.read_bytes(name, first, part)
            else:
                reader.read_into(kind, name, first // ITEM, part)
            writer.write(part)


def _require_model(checkpoint: Path, contents: dict[str, TensorEntry], model: ModelConfig, classes: int) -> None:
    """A file whose tensors do not fit its own header would be of no use to anyone."""
    with torch.device("meta"):
        expected = {
            name: tuple(value.shape)
            for name, value in build_model(model, classes, pretrained=False).state_dict().items()
        }
    found = {name: entry.shape for name, entry in contents.items()}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{checkpoint}: {name} is {_form(found.get(name))}, in the model {_form(expected.get(name))} "
            f"({len(differing)} tensors differ): export it from the run folder that it was written in"
        )


def _form(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
