"""Weights, images and targets of the golden cases, made from names and shapes alone (numpy only).

Every value is a function of the official parameter name and the shape: RandomState(crc32(name)) is a stream that numpy
has frozen. The recording used the same function, so both models hold identical tensors.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np


def canonical(name: str) -> str:
    """The name under which the shared heads of all decoder layers are filled."""
    name = re.sub(r"^transformer\.decoder\.(class_embed|bbox_embed)\.", r"\1.", name)
    return re.sub(r"^(class_embed|bbox_embed)\.\d+\.", r"\1.0.", name)


def values(name: str, shape: Sequence[int]) -> np.ndarray | None:
    """float32 values of the official parameter or buffer `name`; None for integer buffers, which stay."""
    name = canonical(name)
    if name.endswith("relative_position_index"):
        return None
    shape = tuple(int(size) for size in shape)
    rng = _stream(name)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return _float32(0.5 + rng.random_sample(shape))
    normal = rng.standard_normal(shape)
    scale, shift = _scale_and_shift(name, leaf, shape)
    return _float32(shift + scale * normal) if shift else _float32(scale * normal)


def image(tag: str, height: int, width: int) -> np.ndarray:
    """float32 (3, height, width): blocky low-frequency pattern plus noise, about unit variance."""
    rng = _stream("image." + tag)
    coarse = rng.standard_normal((3, -(-height // 16), -(-width // 16)))
    blocks = np.repeat(np.repeat(coarse, 16, 1), 16, 2)[:, :height, :width]
    return _float32(blocks + 0.3 * rng.standard_normal((3, height, width)))


def targets(tag: str, count: int, num_classes: int = 91) -> tuple[np.ndarray, np.ndarray]:
    """labels int64 (count,), boxes float32 (count, 4) centred, in [0, 1], inside the image."""
    rng = _stream("target." + tag)
    labels = rng.randint(1, num_classes, size=count).astype(np.int64)
    size = 0.05 + 0.45 * rng.random_sample((count, 2))
    centre = size / 2 + (1 - size) * rng.random_sample((count, 2))
    return labels, np.concatenate([centre, size], 1).astype(np.float32)


def _scale_and_shift(name: str, leaf: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if leaf == "running_mean":
        return 0.1, 0.0
    if name.endswith("sampling_offsets.bias"):
        return 2.0, 0.0
    if re.search(r"class_embed(\.0)?\.bias$", name):
        return 0.5, -2.0
    if name in ("label_enc.weight", "transformer.tgt_embed.weight", "transformer.level_embed"):
        return 1.0, 0.0
    if leaf == "relative_position_bias_table":
        return 0.2, 0.0
    if leaf in ("bias", "in_proj_bias"):
        return 0.1, 0.0
    if len(shape) == 1:  # weights of norms
        return 0.1, 1.0
    fan_in = float(np.prod(shape[1:]))
    if re.search(r"bbox_embed(\.0)?\.layers\.2\.weight$", name):
        return 0.3 / np.sqrt(fan_in), 0.0
    return 1 / np.sqrt(fan_in), 0.0


def _stream(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)


def _float32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.astype(np.float32))
