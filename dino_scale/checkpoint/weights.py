"""A trained detector in one file: safetensors with everything needed to use it in the header.

The header's "dino_scale" entry is JSON: model configuration, categories (raw id and name, in contiguous order), and how
images are prepared. Nothing here reads a pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino_scale.config.decode import decode_text
from dino_scale.config.schema import ModelConfig, StageConfig
from dino_scale.errors import ConfigError, DataError, UserError
from dino_scale.structures import Category

FORMAT_VERSION = 1
_HEADER = "dino_scale"


@dataclass(frozen=True)
class Preparation:
    """How an image becomes the network's input, and its output detections.

    mean, std: of RGB in [0, 1]. short_side, max_size: pixels.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    short_side: int
    max_size: int
    detections: int = 300  # kept per picture; official num_select

    @classmethod
    def of_stage(cls, config: StageConfig) -> Preparation:
        """That of a stage's own evaluations."""
        data, evaluation = config.data, config.evaluation
        return cls(data.mean, data.std, evaluation.short_side, evaluation.max_size, evaluation.detections)


@dataclass(frozen=True)
class Weights:
    """state: parameter or buffer name to tensor, as in `Dino.state_dict()`."""

    state: dict[str, Tensor]
    model: ModelConfig
    categories: tuple[Category, ...]
    preparation: Preparation


def save_weights(path: Path, weights: Weights) -> None:
    """Write the file beside its final place, sync it, then rename it: never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    state = {name: value.detach().cpu().contiguous() for name, value in weights.state.items()}
    save_file(state, partial, metadata=metadata(weights.model, weights.categories, weights.preparation))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def metadata(model: ModelConfig, categories: Sequence[Category], preparation: Preparation) -> dict[str, str]:
    """What the header of a weights file says beside its tensors."""
    content = {
        "version": FORMAT_VERSION,
        "model": json.dumps(asdict(model)),
        "categories": [asdict(category) for category in categories],
        "preparation": asdict(preparation),
    }
    return {_HEADER: json.dumps(content)}


def load_weights(path: Path) -> Weights:
    """Read what `save_weights` wrote. UserError when there is no such file, DataError when it is something else."""
    return _load(path, tensors=True)


def load_header(path: Path) -> Weights:
    """`load_weights` without the tensors, whatever their size."""
    return _load(path, tensors=False)


def _load(path: Path, tensors: bool) -> Weights:
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; a finished stage leaves one at RUN/STAGE/weights.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
            state = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{path}: not a readable safetensors file ({error})") from None
    if text is None:
        raise DataError(f"{path}: a safetensors file without dino-scale's header: it was not written by dino-scale")
    try:
        return _decode(json.loads(text), state)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise DataError(f"{path}: header of the wrong form ({error})") from None


def _decode(header: dict, state: dict[str, Tensor]) -> Weights:
    if header["version"] != FORMAT_VERSION:
        raise ValueError(f"version {header['version']}, expected {FORMAT_VERSION}")
    preparation = header["preparation"]
    return Weights(
        state=state,
        model=decode_text(header["model"], ModelConfig, "model"),
        categories=tuple(Category(int(entry["id"]), str(entry["name"])) for entry in header["categories"]),
        preparation=Preparation(
            mean=tuple(preparation["mean"]),
            std=tuple(preparation["std"]),
            short_side=int(preparation["short_side"]),
            max_size=int(preparation["max_size"]),
            detections=int(preparation["detections"]),
        ),
    )
